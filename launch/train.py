"""What `deepspeed`, `torchrun` and `srun` start on every rank: `poisonshield train`, and nothing more.

deepspeed launch/train.py CONFIG engine.backend=deepspeed engine.zero_stage=2
torchrun --nproc_per_node 2 launch/train.py CONFIG
"""

import signal
import sys

from poisonshield.cli import main

if __name__ == "__main__":
    # launch/slurm/deepspeed_node.sh keeps these from DeepSpeed's launchers, not from us: one that came early comes now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1))
    # Launchers put --local_rank=N or --local-rank=N first; they set LOCAL_RANK as well, which is the one that is read.
    main(["train", *(a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank")))])
