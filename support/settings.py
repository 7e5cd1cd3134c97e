"""Where a training run starts, and how its settings come together: from defaults, a TOML file and flags, from
the checkpoint that it continues, or from the Hugging Face folder that it starts from."""

import os
import sys
from dataclasses import asdict, fields

from support import hf, parallel
from support.cli import UserError, checked, given_settings, merged
from support.runs import Run


def start(cls, free_on_resume: set[str], description: str):
    """The settings of dataclass `cls` (train.TrainConfig) that the command line asks for, and the run: a new
    one, or with --init_from=resume the one in out_dir, at its checkpoint. UserError for what contradicts the
    checkpoint or the folder."""
    if parallel.RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    # What the user gave stays apart from defaults, which a checkpoint or folder overrides.
    given = given_settings(cls, description)
    # The others, such as a plan, are for a number of layers that is not known yet.
    c = cls(**{name: given[name] for name in ("out_dir", "init_from", "block_size") if name in given})
    run = Run(c.out_dir, writes=parallel.RANK == 0)
    if c.init_from == "resume":
        before = checked(run.resume()["config"], cls, run.source)
        # A run that was moved stays where it is now. Its init_from still says what it started from.
        given = given | {"out_dir": c.out_dir, "init_from": before["init_from"]}
        before["out_dir"] = c.out_dir
        c = cls(**merged(before, given, free_on_resume, run.source))
        if run.start >= c.max_iters:
            print(f"{c.out_dir}: all {run.start} steps are done; more: --max_iters")
            sys.exit(0)
        return c, run
    run.refuse_used_folder()
    if c.init_from.startswith("hf:"):
        folder = c.init_from[3:]
        if not folder:
            raise UserError("--init_from hf: needs a folder, hf:FOLDER")
        found = asdict(hf.read_config(folder, c.block_size))
        sizes = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        free = {"plan", "router_lowest", "forward_passes", "backward_passes"}
        return cls(**merged(sizes, given, free, folder)), run
    if c.init_from != "scratch":
        raise UserError(f"--init_from {c.init_from!r} is not valid; it is scratch, resume or hf:FOLDER")
    return cls(**given), run
