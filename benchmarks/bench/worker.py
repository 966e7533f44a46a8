"""One measurement in a process of its own: a task's name, the number of threads and its arguments, as JSON."""

import json
import sys

import torch

from benchmarks.bench.measure import TASKS
from sparsenet.device import tune_process

tune_process()
task, threads, arguments = json.loads(sys.argv[1])
torch.set_num_threads(threads)
print(json.dumps(TASKS[task](**arguments)))
