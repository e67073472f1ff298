"""Run a compiler and keep what it said: `python compiler_log.py <compiler> <arguments>`.

CMake starts this in the compiler's place (CMAKE_CUDA_COMPILER_LAUNCHER). Beside the object file it
leaves <object>.json with the output, the seconds of CPU time and the peak memory of the largest
process.
"""

import json
import resource
import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout if done.returncode != 0 else "")
if "-o" in command:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = {
        "output": done.stdout,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }
    with open(command[command.index("-o") + 1] + ".json", "w") as file:
        json.dump(record, file)
sys.exit(done.returncode)
