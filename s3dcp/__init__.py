"""S3 storage for PyTorch Distributed Checkpoint, on asyncio."""

from s3dcp._catalog import Garbage, abort_uploads, delete, gc, latest, list_checkpoints
from s3dcp._checkpoint import aload, asave, async_save, load, save
from s3dcp._config import S3ClientConfig
from s3dcp._consolidation import consolidate_safetensors_files
from s3dcp._constructors import (
    DCPS3ReaderConstructorProtocol,
    S3ReaderConstructor,
    S3ReaderConstructorProtocol,
)
from s3dcp._copying import CopyReport, acopy, copy
from s3dcp._dcp_reader import DCPOptimizedS3Reader, ItemRange
from s3dcp._errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CheckpointChangedError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    ConflictError,
    CorruptMetadataError,
    DiskError,
    IncompleteSaveError,
    IntegrityError,
    InvalidS3UriError,
    ObjectNotFoundError,
    PortalError,
    PreconditionFailedError,
    S3ConfigError,
    S3ConnectionError,
    S3CredentialsError,
    S3Exception,
    S3ProtocolError,
    S3ServiceError,
    S3TimeoutError,
    ServerError,
    ThrottledError,
    UnsafeItemError,
    WrongRegionError,
)
from s3dcp._filesystem import S3FileSystem
from s3dcp._hf_reader import S3HuggingFaceStorageReader
from s3dcp._hf_writer import S3HuggingFaceStorageWriter
from s3dcp._inventory import CheckpointInfo
from s3dcp._planner import WeightsOnlyLoadPlanner
from s3dcp._prefixes import (
    BinaryPrefixStrategy,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    NumericPrefixStrategy,
    RoundRobinPrefixStrategy,
    S3PrefixStrategyBase,
)
from s3dcp._progress import ProgressCallback
from s3dcp._ranged_reader import RangedS3Reader
from s3dcp._reader import S3StorageReader
from s3dcp._readers import S3Reader, SequentialS3Reader
from s3dcp._report import Report, RequestPrices
from s3dcp._s3client import S3Client
from s3dcp._store import ObjectInfo, UploadInfo
from s3dcp._streams import S3Writer
from s3dcp._tally import OperationTotals, Totals
from s3dcp._writer import S3StorageWriter, StorageMetadata

__version__ = "0.1.0"

__all__ = [
    # checkpoints
    "S3StorageReader",
    "S3StorageWriter",
    "StorageMetadata",
    "WeightsOnlyLoadPlanner",
    # safetensors
    "S3HuggingFaceStorageReader",
    "S3HuggingFaceStorageWriter",
    "consolidate_safetensors_files",
    # calls
    "aload",
    "asave",
    "async_save",
    "load",
    "save",
    # catalog
    "CheckpointInfo",
    "CopyReport",
    "Garbage",
    "UploadInfo",
    "abort_uploads",
    "acopy",
    "copy",
    "delete",
    "gc",
    "latest",
    "list_checkpoints",
    # reports
    "OperationTotals",
    "ProgressCallback",
    "Report",
    "RequestPrices",
    "Totals",
    # files and objects
    "ObjectInfo",
    "S3Client",
    "S3ClientConfig",
    "S3FileSystem",
    "S3Writer",
    # prefix strategies
    "BinaryPrefixStrategy",
    "DefaultPrefixStrategy",
    "HexPrefixStrategy",
    "NumericPrefixStrategy",
    "RoundRobinPrefixStrategy",
    "S3PrefixStrategyBase",
    # readers
    "DCPOptimizedS3Reader",
    "DCPS3ReaderConstructorProtocol",
    "ItemRange",
    "RangedS3Reader",
    "S3Reader",
    "S3ReaderConstructor",
    "S3ReaderConstructorProtocol",
    "SequentialS3Reader",
    # errors
    "AccessDeniedError",
    "BucketNotFoundError",
    "CheckpointChangedError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "CommitConflictError",
    "ConflictError",
    "CorruptMetadataError",
    "DiskError",
    "IncompleteSaveError",
    "IntegrityError",
    "InvalidS3UriError",
    "ObjectNotFoundError",
    "PortalError",
    "PreconditionFailedError",
    "S3ConfigError",
    "S3ConnectionError",
    "S3CredentialsError",
    "S3Exception",
    "S3ProtocolError",
    "S3ServiceError",
    "S3TimeoutError",
    "ServerError",
    "ThrottledError",
    "UnsafeItemError",
    "WrongRegionError",
    "__version__",
]
