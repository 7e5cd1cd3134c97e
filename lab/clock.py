"""A clock that does not make a GPU wait."""

import time

import torch


class Clock:
    """Marks moments, and gives the seconds between them once all are past. On a GPU the marks are CUDA
    events, so that taking them does not hold up the work."""

    def __init__(self, device: torch.device | str):
        self.cuda, self.marks = torch.device(device).type == "cuda", []
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]
