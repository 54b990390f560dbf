"""What s3dcp reaches, side by side with its peers and with what the machine allows.

`make bench` runs everything and writes `benchmarks/README.md`. Two kinds of processes take part:
the driver (`__main__`, `_lab`, `_rows`) starts servers and workers, and decides; workers
(`_worker`) measure, each one backend, and print a line of JSON for every measurement.
"""
