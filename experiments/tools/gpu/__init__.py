"""What only a GPU can tell, within ten minutes: `make gpu`, or python3 -m experiments.tools.gpu --help.

Stages are listed in `stages.py`. Each runs in a process of its own, so that a crash, an illegal access, a hang or a
full memory ends that stage alone. Nothing is timed that was not checked: a timing names the checks that it needs, and
without them the row says so instead.

results.jsonl: every row, written the moment it exists; log.txt: what the stages print; summary.md: the table, written
again after every stage; trace.json.gz, counters.csv and memory.txt: what the profilers and the memory checker say.
"""
