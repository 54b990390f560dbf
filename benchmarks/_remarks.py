"""What is known of targets that are missed: where the time goes, what was tried. Kept by hand.

The page prints a remark beneath its target when a run misses that, and not otherwise.
"""

from __future__ import annotations

#: By row and metric, as in `_targets.TARGETS`.
REMARKS: dict[tuple[str, str], str] = {
    ("bulk", "save: GiB/s, times the reference's"): (
        "Something else ran during the first rows of the run of df66f61. By themselves, of "
        "487f8a8: 2.23 times the reference's GiB/s, 0.38 of its CPU time, 1.61 times the RAM "
        "disk's; small tensors 0.29 s to save and 0.27 s to load beyond DCP's planning."
    ),
    ("tls", "save: GiB/s, times the reference's"): (
        "Both ends share the two cores. Beside `s3null` with TLS, which costs less than this "
        "server, a GiB takes 0.83 s of CPU here and 0.56 s there: 1.4 GiB/s would be all there "
        "is. The reference library saves at 0.4 to 0.6 GiB/s on this machine, and at 0.25 where "
        "the target was set. Tried, in turns with uvloop's TLS (1.0-1.1 GiB/s, 0.83 cpu-s/GiB): "
        "OpenSSL on the socket itself, on two worker threads (0.95 and 1.07) and on the loop's "
        "(0.86 and 1.14), which is a system call for each record of 16 KiB; in batches of 256 "
        "KiB, on workers (0.99 and 1.05) and on the loop's thread, of 1 MiB (0.96 and 0.99). A "
        "load on workers came to 0.79 GiB/s and 1.39 cpu-s/GiB instead of 0.90 and 1.01: each "
        "record takes the GIL, for which the threads then wait. Two whole loops, each with "
        "connections of its own, as `S3ClientConfig.loops` has them where there are cores: save "
        "1.13 and 0.87 where one had 1.26 and 0.72, load 0.91 and 1.24 where one had 0.79 and "
        "1.06. More threads are for machines with cores to spare, where none of this was measured."
    ),
    ("small", "save: beyond DCP's planning"): (
        "Of the planning thread's time, 0.15 s go into resolving, framing, checking and copying "
        "the items, 0.04 s into pickling the metadata, where equal sizes and properties are named "
        "again; in the rest it waits for the last parts, whose requests want the same GIL."
    ),
    ("small", "load: beyond DCP's planning"): (
        "0.05 s to read and check the metadata, 0.05 s to plan the requests, 0.1 s to place, "
        "check and copy the items; in the rest it waits for the first and the last spans, whose "
        "requests want the same GIL."
    ),
    ("slow", "load: times faster than the reference"): (
        "After the metadata, 50 requests of 10 MiB are on the wire at once. The loop takes 1 ms to "
        "make each of them, the store 30 ms to answer, and the link 0.18 s: 0.29 s at the least. "
        "The rest is CPU time, of which client and server take 0.4 s on the two cores."
    ),
    ("slow", "save: times faster than the reference"): (
        "Four requests follow one another, 30 ms each: the look at what is there, beside which the "
        "upload begins and the parts are made; the parts, all at once, for which the link takes "
        "0.19 s of each one's 11 MiB; the upload's completion; the metadata. That is 0.32 s at the "
        "least, and a third of the reference's time is not much more. The rest is CPU time, of "
        "which client and server take 0.4 s on the two cores."
    ),
    ("growth", "save: time for 4 times the tensors"): (
        "DCP's own part grows faster than the tensors, as the last row shows: the garbage "
        "collector walks ever more objects."
    ),
    ("growth", "load: time for 4 times the tensors"): (
        "DCP's own part grows faster than the tensors, as the last row shows: the garbage "
        "collector walks ever more objects."
    ),
}
