"""SigV4, checked as S3 does: who signed, for which day and region, and every header that counts.

Signatures in the query (presigned URLs) and SigV4A are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from urllib.parse import quote, unquote, unquote_plus

from s3dcp.testing._bodies import Body
from s3dcp.testing._requests import Request, S3Error
from s3dcp.testing._sums import digest

_SCHEME = "AWS4-HMAC-SHA256"
_SHAPE = re.compile(
    rf"{_SCHEME} Credential=(?P<key>[^/,]+)/(?P<day>\d{{8}})/(?P<region>[^/,]+)/s3/aws4_request, ?"
    r"SignedHeaders=(?P<headers>[^,]+), ?Signature=(?P<signature>[0-9a-f]{64})"
)
_MAX_SKEW = timedelta(minutes=15)
_EMPTY = hashlib.sha256(b"").hexdigest()
_HEX = re.compile("[0-9a-f]{64}")
_UNHASHED = {
    "UNSIGNED-PAYLOAD",
    "STREAMING-UNSIGNED-PAYLOAD-TRAILER",
    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD",
    "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A request whose signature holds; what the signatures of its chunks go on from."""

    payload: str
    time: str
    scope: str
    signing_key: bytes
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """Knows one pair of credentials.

    Args:
        region: Of the endpoint.
        session_token: The token that must come with them, if any.
    """

    access_key: str
    secret_key: str
    region: str
    session_token: str | None = None

    def verify_head(self, request: Request, region: str) -> Signed:
        """Check the signature of a request's head.

        Args:
            request: What is asked for.
            region: Where its bucket is.

        Raises:
            S3Error: It is missing, malformed, stale, or wrong.
        """
        headers = request.headers
        if (given := headers.get("authorization")) is None:
            raise S3Error("AccessDenied", "Access Denied: the request is not signed.")
        if (found := _SHAPE.fullmatch(given)) is None:
            raise S3Error(
                "AuthorizationHeaderMalformed",
                "The authorization header that you provided is not valid.",
            )
        if found["key"] != self.access_key:
            raise S3Error(
                "InvalidAccessKeyId",
                "The AWS Access Key Id you provided does not exist in our records.",
            )
        if headers.get("x-amz-security-token") != self.session_token:
            raise S3Error("InvalidToken", "The provided token is malformed or otherwise invalid.")
        if found["region"] != region:
            raise self._elsewhere(request.bucket, found["region"], region)
        time = headers.get("x-amz-date", "")
        _verify_time(time, found["day"])
        payload = headers.get("x-amz-content-sha256", "")
        if not (_HEX.fullmatch(payload) or payload in _UNHASHED):
            raise S3Error("InvalidRequest", "Missing or invalid header: x-amz-content-sha256")
        names = found["headers"].split(";")
        _verify_names(names, headers)
        scope = f"{found['day']}/{region}/s3/aws4_request"
        signing_key = _signing_key(self.secret_key, found["day"], region)
        canonical = _canonical(request, names, payload)
        hashed = hashlib.sha256(canonical.encode("latin-1")).hexdigest()
        wanted = _sign(signing_key, _SCHEME, time, scope, hashed)
        if not hmac.compare_digest(wanted, found["signature"]):
            raise S3Error(
                "SignatureDoesNotMatch",
                "The request signature we calculated does not match the signature you provided.",
                CanonicalRequest=canonical,
            )
        return Signed(
            payload=payload, time=time, scope=scope, signing_key=signing_key, signature=wanted
        )

    def _elsewhere(self, bucket: str, signed_for: str, region: str) -> S3Error:
        headers = {"x-amz-bucket-region": region}
        if signed_for == self.region:  # so it was sent to this endpoint, and not to the bucket's
            return S3Error(
                "PermanentRedirect",
                "The bucket you are attempting to access must be addressed using the specified "
                "endpoint. Please send all future requests to this endpoint.",
                headers=headers,
                Endpoint=f"{bucket}.s3.{region}.amazonaws.com",
                Bucket=bucket,
            )
        return S3Error(
            "AuthorizationHeaderMalformed",
            "The authorization header is malformed; "
            f"the region '{signed_for}' is wrong; expecting '{region}'",
            headers=headers,
            Region=region,
        )


def verify_payload(signed: Signed, body: Body) -> None:
    """Check a body against the hash, or the signatures of its chunks, that came with it.

    Raises:
        S3Error: It is another body than the one that was signed.
    """
    if _HEX.fullmatch(signed.payload):
        if digest(hashlib.sha256, body.blob).hex() != signed.payload:
            raise S3Error(
                "XAmzContentSHA256Mismatch",
                "The provided 'x-amz-content-sha256' header does not match what was computed.",
            )
    elif signed.payload.startswith("STREAMING-AWS4-HMAC"):
        _verify_chunks(signed, body)


def _verify_chunks(signed: Signed, body: Body) -> None:
    previous, at = signed.signature, 0
    for chunk in body.chunks:
        data = body.blob.slice(at, at + chunk.size_bytes)
        at += chunk.size_bytes
        hashed = digest(hashlib.sha256, data).hex()
        previous = _sign(
            signed.signing_key,
            f"{_SCHEME}-PAYLOAD",
            signed.time,
            signed.scope,
            previous,
            _EMPTY,
            hashed,
        )
        if not hmac.compare_digest(previous, chunk.signature):
            raise S3Error("SignatureDoesNotMatch", f"A chunk before byte {at} is signed wrongly.")
    if not signed.payload.endswith("-TRAILER"):
        return
    lines = "".join(
        f"{name}:{value}\n"
        for name, value in body.trailers.items()
        if name != "x-amz-trailer-signature"
    )
    hashed = hashlib.sha256(lines.encode("latin-1")).hexdigest()
    wanted = _sign(
        signed.signing_key, f"{_SCHEME}-TRAILER", signed.time, signed.scope, previous, hashed
    )
    if not hmac.compare_digest(wanted, body.trailers.get("x-amz-trailer-signature", "")):
        raise S3Error("SignatureDoesNotMatch", "The trailer is signed wrongly.")


def _verify_time(text: str, day: str) -> None:
    try:
        moment = datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise S3Error(
            "AccessDenied", "AWS authentication requires a valid x-amz-date header"
        ) from None
    if not text.startswith(day):
        raise S3Error("SignatureDoesNotMatch", "The date is not the one of the credential's scope.")
    if abs(datetime.now(UTC) - moment) > _MAX_SKEW:
        raise S3Error(
            "RequestTimeTooSkewed",
            "The difference between the request time and the current time is too large.",
            RequestTime=text,
        )


def _verify_names(names: list[str], headers: Mapping[str, str]) -> None:
    must = {
        name for name in headers if name.startswith("x-amz-") or name in {"host", "content-md5"}
    }
    if unsigned := sorted(must - set(names)):
        raise S3Error(
            "AccessDenied",
            "There were headers present in the request which were not signed",
            HeadersNotSigned=", ".join(unsigned),
        )
    if names != sorted(names) or not set(names) <= set(headers):
        raise S3Error(
            "SignatureDoesNotMatch", "SignedHeaders is unsorted, or names what is not there."
        )


def _canonical(request: Request, names: list[str], payload: str) -> str:
    pairs = sorted(
        (_encoded(unquote_plus(name)), _encoded(unquote_plus(value)))
        for name, _, value in (pair.partition("=") for pair in request.raw_query.split("&") if pair)
    )
    return "\n".join(
        (
            request.method,
            _encoded(unquote(request.path, errors="surrogateescape"), "/"),
            "&".join(f"{name}={value}" for name, value in pairs),
            *(f"{name}:{' '.join(request.headers[name].split())}" for name in names),
            "",
            ";".join(names),
            payload,
        )
    )


def _encoded(text: str, safe: str = "") -> str:
    return quote(text, safe=f"{safe}-_.~", errors="surrogateescape")


@lru_cache(maxsize=64)
def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for word in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, word.encode(), "sha256")
    return key


def _sign(signing_key: bytes, *lines: str) -> str:
    return hmac.digest(signing_key, "\n".join(lines).encode(), "sha256").hex()
