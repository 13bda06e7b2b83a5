"""Small things on their way between host and device, without anybody waiting for them.

A copy from ordinary memory makes the host wait until the device has done all that it was asked before; one from pinned
memory does not. A number that is read makes it wait too, unless it was sent on its way earlier and has arrived.
"""

import torch
from torch import Tensor


def send(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host goes on at once. The same tensor where it is there already."""
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned copy until it was read


class Letter:
    """Numbers that a device will have, sent to the host now and read later."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._written = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype).pin_memory()
            self._host.copy_(numbers, non_blocking=True)
            self._written = torch.cuda.Event()
            self._written.record()

    def read(self) -> list[bool]:
        """The numbers; waits until they are there."""
        if self._written is not None:
            self._written.synchronize()
        return self._host.tolist()
