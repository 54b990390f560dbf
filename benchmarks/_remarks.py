"""What is known of targets that are missed: where the time goes, what was tried. Kept by hand.

The page prints a remark beneath its target when a run misses that, and not otherwise.
"""

from __future__ import annotations

_COLLECTOR = (
    "What grows faster than the tensors is DCP's planning, as the last row shows: the garbage "
    "collector walks all objects meanwhile, 0.2 s with 5,000 tensors and twice 0.4 s with 20,000. "
    "s3dcp holds it back for as long as DCP plans, but for 5 s at most. Beyond that, single runs "
    "differ by half: the tensors no longer fit into the caches."
)

#: By row and metric, as in `_targets.TARGETS`.
REMARKS: dict[tuple[str, str], str] = {
    ("bulk", "save: GiB/s, times the reference's"): (
        "It was 1.5 to 2.8 GiB/s in runs of one week, with 0.35 to 0.54 cpu-s/GiB, 1.8 to 2.9 "
        "times the reference's: client and server fill both cores, and on this machine these are "
        "not always there. The loop's thread is the longest: half of its time are the kernel's "
        "copies; botocore takes 0.7 ms to make a request."
    ),
    ("tls", "save: GiB/s, times the reference's"): (
        "Both ends share the two cores. Against `s3null` with TLS, which costs less than this "
        "server, s3dcp saves at 1.00 to 1.25 GiB/s with 0.74 to 0.90 cpu-s/GiB, 1.75 to 2.1 times "
        "the reference's speed with half of its CPU time (0.57 to 0.59 and 1.63 to 1.72; it loads "
        "at 0.95, 1.7 times). All of that time is the one thread's that runs the loop: a third of "
        "it the cipher, a quarter the kernel, a sixth copies from OpenSSL's memory to Python's and "
        "on, a tenth Python. The server's own part is 0.56 s a GiB, so 1.5 GiB/s would be all "
        "there is. OpenSSL by itself, without HTTP, S3 or checksums, takes 0.45 to 0.55 s a GiB to "
        "send, and 0.41 to 0.48 to receive. The reference library saved at 0.25 where the target "
        "was set. This kernel has no TLS of its own. Tried: writes of 64, 128 and 256 KiB where "
        "they have 1 MiB (0.99, 0.99 and 1.15 GiB/s beside 1.25), and 64 KiB at a time within "
        "these (1.34 beside 1.29: little, and past aiohttp); and, in turns with uvloop's TLS "
        "(1.0-1.1 GiB/s, 0.83 cpu-s/GiB): OpenSSL on the socket itself, on two worker threads "
        "(0.95 and 1.07) and on the loop's (0.86 and 1.14), which is a system call for each record "
        "of 16 KiB; in batches of 256 KiB, on workers (0.99 and 1.05) and on the loop's thread, of "
        "1 MiB (0.96 and 0.99). A load on workers came to 0.79 GiB/s and 1.39 cpu-s/GiB instead of "
        "0.90 and 1.01: each record takes the GIL, for which the threads then wait. Two whole "
        "loops, each with connections of its own, as `S3ClientConfig.loops` has them where there "
        "are cores: save 1.13 and 0.87 where one had 1.26 and 0.72, load 0.91 and 1.24 where one "
        "had 0.79 and 1.06. More threads are for machines with cores to spare, where none of this "
        "was measured."
    ),
    ("tls", "save: cpu-s/GiB, times the reference's"): (
        "0.47 to 0.56 in runs of one day: both libraries' time is that of their ciphers, and of "
        "the kernel's copies."
    ),
    ("small", "save: beyond DCP's planning"): (
        "Of the planning thread's time, 0.15 s go into resolving, framing, checking and copying "
        "the items, 0.04 s into pickling the metadata, where equal sizes and properties are named "
        "again; in the rest it waits for the last parts, whose requests want the same GIL. Without "
        "the calls that let go of the GIL for each tensor (is it conjugated, negative, zero?) it "
        "takes as long. In a loop without requests an item takes 11 us, beside them 25 to 40: half "
        "for the pages of new memory, which is now used again as soon as a part was sent, and "
        "the rest was not found: it is the same without checksums, and with another length of "
        "Python's turns. Where a full collection comes before each save and load, the planning "
        "alone has none in it: 0.22 s then, where it was 0.15."
    ),
    ("small", "load: beyond DCP's planning"): (
        "0.05 s to read and check the metadata, 0.05 s to plan the requests, 0.1 s to place, "
        "check and copy the items; in the rest it waits for the first and the last spans, whose "
        "requests want the same GIL."
    ),
    ("slow", "load: times faster than the reference"): (
        "After the metadata, 50 requests of 10 MiB are on the wire at once. The loop takes 0.7 ms "
        "to make each of them, the store 30 ms to answer, and the link 0.18 s: 0.28 s at the "
        "least. The rest is CPU time, of which client and server take 0.4 s on the two cores."
    ),
    ("slow", "save: times faster than the reference"): (
        "Four requests follow one another, 30 ms each: the look at what is there, beside which the "
        "upload begins and the parts are made; the parts, all at once, for which the link takes "
        "0.19 s of each one's 11 MiB; the upload's completion; the metadata. That is 0.32 s at the "
        "least, and a third of the reference's time is 0.39 s. But the parts take 0.29 s: client "
        "and server need 0.5 s of CPU for them. Each of 1,026 writes takes 0.5 MiB, so finer or "
        "coarser ones are not it. Twice the connections gained 11% once, and cost as many TLS "
        "handshakes again. Against `s3null`, which keeps no bytes and throttles no uploads, it is "
        "0.28 to 0.32 s, 3.0 to 3.7 times: 0.13 s of waiting, checksums beside it, and 0.15 s in "
        "which the loop's thread hands 512 MiB to the kernel."
    ),
    ("disturbance", "99th percentile of hold-ups"): (
        "Python gives each thread 5 ms before another's turn, and this percentile lies there: 3.9 "
        "to 7.0 ms in runs one after the other, the reference's 4.2 to 6.0."
    ),
    ("growth", "save: time for 4 times the tensors"): _COLLECTOR,
    ("growth", "load: time for 4 times the tensors"): _COLLECTOR,
}
