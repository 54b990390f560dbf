"""What a pickle of metadata may be made of, checked before it is unpickled.

The C unpickler believes what a pickle states. Five bytes make it fill 64 GB (LONG_BINPUT, a flipped
bit away from SETITEM), nine allocate any amount (BYTEARRAY8, a flipped bit away from MEMOIZE). So
all opcodes are looked at first: one regular expression runs over those that picklers write for
plain objects, which takes a third of the time that unpickling takes, and stops at what needs a
closer look. All else is refused; of protocols, 2 and later are known.
"""

from __future__ import annotations

import re


class OpcodeError(ValueError):
    """A pickle that holds what no metadata needs, or does not end where it says."""


def _counted(opcode: bytes) -> bytes:
    """Match an opcode, a byte that is a length, and as many bytes."""
    lengths = (re.escape(bytes([n])) + b".{%d}" % n for n in range(256))
    return opcode + b"(?:" + b"|".join(lengths) + b")"


_PLAIN = re.compile(
    b"(?:"
    + b"|".join(
        (
            # MEMOIZE, NONE, NEWTRUE, NEWFALSE; tuples; other containers and what is put into them;
            # STACK_GLOBAL, REDUCE, NEWOBJ, BUILD
            rb"[\x94N\x88\x89)\x85\x86\x87t(}\]us\x61e\x8f\x90\x91\x93R\x81b]++",
            rb"[hKq].",  # BINGET, BININT1, BINPUT
            rb"M..",  # BININT2
            rb"[jJ].{4}",  # LONG_BINGET, BININT
            rb"G.{8}",  # BINFLOAT
            *map(_counted, (rb"\x8c", rb"C", rb"\x8a")),  # SHORT_BINUNICODE, SHORT_BINBYTES, LONG1
            rb"c[^\n]{0,255}\n[^\n]{0,255}\n",  # GLOBAL
        )
    )
    + b")*+",
    re.DOTALL,
)

_PROTO, _STOP, _FRAME, _LONG_BINPUT = b"\x80", b".", b"\x95", b"r"
_SIZED = (b"X", b"B")  # BINUNICODE, BINBYTES
_FRAME_HEAD_BYTES = 9
_HEAD_BYTES = 5


def check_opcodes(data: bytes | bytearray | memoryview) -> int:
    """Check that unpickling takes no more memory than the pickle's size accounts for.

    Returns:
        Where the pickle ends.

    Raises:
        OpcodeError: it might, or is none.
    """
    view = memoryview(data)
    if bytes(view[:1]) != _PROTO:
        raise OpcodeError("it does not start as pickles do")
    at, end = 2, len(view)
    # Opcodes do not reach over a frame's end: there the unpickler would lose its place, and read
    # on where this does not look.
    frame_end: int | None = None
    while True:
        match = _PLAIN.match(view, at, end if frame_end is None else frame_end)
        assert match is not None
        at = match.end()
        if at == frame_end:
            frame_end = None
            continue
        opcode = bytes(view[at : at + 1])
        if opcode == _STOP and frame_end in {None, at + 1}:
            return at + 1
        if opcode == _FRAME and frame_end is None:
            frame_end = at + _FRAME_HEAD_BYTES + _number(view[at + 1 : at + _FRAME_HEAD_BYTES])
            at += _FRAME_HEAD_BYTES
            known = at < frame_end <= end
        elif opcode in _SIZED:
            at += _HEAD_BYTES + _number(view[at + 1 : at + _HEAD_BYTES])
            known = at <= (end if frame_end is None else frame_end)
        elif opcode == _LONG_BINPUT:
            known = _number(view[at + 1 : at + _HEAD_BYTES]) < end
            at += _HEAD_BYTES
        else:
            known = False
        if not known:
            raise OpcodeError(f"opcode {opcode!r}, before byte {at}, is cut short or not admitted")


def _number(raw: memoryview) -> int:
    return int.from_bytes(raw, "little")
