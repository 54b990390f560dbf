"""aiobotocore's clients, made to send one request a call.

botocore signs, builds addresses and finds credentials. It is told not to retry (the engine does),
not to follow a bucket to another region than the one that the user gave (who is told), not to hash
or sum bodies (the engine has), and not to ask before it sends one.

Where the user gave no region, botocore follows a bucket to its own: the answer says which that is,
or a HeadBucket does. The request is sent once more, and the later ones go there at once.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import re
from collections import OrderedDict
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.loaders import JSONFileLoader, create_loader
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

from s3dcp._config import S3ClientConfig
from s3dcp._portal import offload


async def new_session(config: S3ClientConfig) -> AioSession:
    """Return what finds the user's settings and makes clients, with botocore's models read."""
    session = AioSession(profile=config.profile)
    loader = _loader(session.get_config_variable("data_path"))
    session.register_component("data_loader", loader)
    parsers = session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=_moment)
    # Parsing botocore's models takes 0.1 s, which the loop must not spend.
    await offload(_preload, loader)
    return session


def new_client(
    session: AioSession, region: str | None, config: S3ClientConfig
) -> contextlib.AbstractAsyncContextManager[Any]:
    """Return a client of S3, for use on the loop that enters it.

    Args:
        session: Of `new_session`; makes one client.
        region: None: `AWS_REGION`, botocore's own sources, or else the bucket.
        config: The client's settings.
    """
    s3 = {"payload_signing_enabled": False}
    client = session.create_client(
        "s3",
        region_name=region or os.environ.get("AWS_REGION") or None,
        endpoint_url=config.endpoint_url,
        verify=str(config.ca_bundle) if config.ca_bundle else None,
        config=AioConfig(
            s3=s3 | ({"addressing_style": "path"} if config.force_path_style else {}),
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            max_pool_connections=config.connections() + 8,  # the engine's slots are the limit
            retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            user_agent=_user_agent(session),
            user_agent_extra="lib/s3dcp",
            http_session_cls=_Session,
            **({"signature_version": UNSIGNED} if config.unsigned else {}),
        ),
    )
    return _Prepared(client, follows=not region)


class _Session(AIOHTTPSession):  # type: ignore[misc]  # it has no types
    """Requests that are sent once.

    aiohttp by itself sends a PUT again whose connection was lost. If the first was the commit, the
    second is refused with 412, as if another writer had come first.
    """

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False  # noqa: SLF001 - there is no argument for it
        return session


class _Prepared(contextlib.AbstractAsyncContextManager[Any]):
    """A client whose requests carry no `Expect` header, and may stay in their region."""

    def __init__(
        self, client: contextlib.AbstractAsyncContextManager[Any], *, follows: bool
    ) -> None:
        self._creator = client
        self._follows = follows

    async def __aenter__(self) -> Any:
        client = await self._creator.__aenter__()
        client.meta.events.register("before-sign.s3", _drop_expect)
        if not self._follows:
            client.meta.events.register("before-call.s3", _stay_in_region)
        return client

    async def __aexit__(self, *exc_info: Any) -> None:  # noqa: PYI036 - only passed on
        await self._creator.__aexit__(*exc_info)


@functools.cache
def _loader(data_path: str | None) -> Any:
    """Return what reads botocore's models: one for all clients, which each take 0.2 s less."""
    loader = create_loader(data_path)
    loader.file_loader = _ModelFiles()
    return loader


class _ModelFiles(JSONFileLoader):  # type: ignore[misc]  # it has no types
    """Reads botocore's models, and lets other threads run meanwhile.

    To decode a model is one call into C, and 22 ms for S3's, in which no thread runs that is not
    this one: some thread's loop would wait. Not so where each object is made by Python code.
    """

    def load_file(self, file_path: str) -> Any:
        """Return what a file without its extension holds, or None if there is no such file."""
        for path, opened in (
            (Path(f"{file_path}.json"), open),
            (Path(f"{file_path}.json.gz"), gzip.open),
        ):
            if path.is_file():
                with opened(path, "rb") as file:
                    return json.loads(file.read(), object_pairs_hook=_ordered)
        return None


def _ordered(pairs: list[tuple[str, Any]]) -> OrderedDict[str, Any]:
    return OrderedDict(pairs)


def _preload(loader: Any) -> None:
    for name in ("service-2", "endpoint-rule-set-1", "paginators-1"):
        loader.load_service_model("s3", name)
    for data in ("endpoints", "partitions", "sdk-default-configuration"):
        loader.load_data(data)


def _user_agent(session: AioSession) -> str | None:
    """Return a constant one: botocore puts its own together twice a request, a tenth of its time.

    None, which is botocore's own, where it is to carry the id of the user's application, or where
    the environment has something that no header can hold.
    """
    agent: str = session.user_agent()
    if session.get_config_variable("user_agent_appid") or not (
        agent.isascii() and agent.isprintable()
    ):
        return None
    session.user_agent_extra = ""  # is in it, and would be added again
    return agent


_ISO_8601 = re.compile(r"\d{4}-\d\d-\d\dT")
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT")


def _moment(text: object) -> datetime:
    """Parse a time in an answer. botocore's own errors would be taken for a setting's.

    What S3 sends takes a few microseconds. botocore's parser, which knows much more, takes 90, and
    a page of a list has a thousand.
    """
    try:
        if isinstance(text, str):
            with contextlib.suppress(ValueError):
                if _ISO_8601.match(text):
                    return datetime.fromisoformat(text)
                if _HTTP_DATE.fullmatch(text):
                    return parsedate_to_datetime(text)
        moment: datetime = parse_timestamp(text)
    except (RuntimeError, ValueError) as exc:
        raise ResponseParserError(str(exc)) from exc
    return moment


def _drop_expect(request: Any, **_: object) -> None:
    # A round trip for every part, and a wait without end where a store ignores it.
    if "Expect" in request.headers:
        del request.headers["Expect"]


def _stay_in_region(params: dict[str, Any], **_: object) -> None:
    # botocore's redirector skips what it takes for redirected already.
    params["context"].setdefault("s3_redirect", {})["redirected"] = True
