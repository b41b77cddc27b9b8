"""Sweeps on a machine with one GPU, no network and a few minutes.

`pack`, here, fills a folder with what such a machine lacks: packages, and compiled device kernels. `run`, there, runs
several cells at a time on the GPU until all have ended or the time is up, and keeps their results:

    python -m experiments.tools.gpu_sweeps.pack benchmark_pilot benchmark --out pack --have freeze.txt
    python3 -m experiments.tools.gpu_sweeps.run benchmark_pilot benchmark --pack pack --out out --minutes 8
    tar -xzf out/runs.tar.gz -C $ZOO_HOME

freeze.txt is what `pip freeze` prints there. The archive is unpacked here: `zoo report benchmark-gpu` reads the runs as
if they had been made here.
"""
