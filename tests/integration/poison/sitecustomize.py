"""On the PYTHONPATH of one federation: for three rounds mallory's trainer sends the opposite of what it learned."""

import sys
from dataclasses import replace

if "nvflare_fm.flare.trainer" in sys.orig_argv and any("/mallory/" in word for word in sys.orig_argv):
    import torch

    from nvflare_fm.compare.attacks import Attack, Known
    from nvflare_fm.site.worker import Worker

    _train = Worker.train
    _attack = Attack(({"rule": "sign_flip", "far": 10.0},))

    def _poisoned(self, task):
        update = _train(self, task)
        if task.round >= 3:
            return update
        (sent,) = _attack.tampered(Known([update], [], task.adapter, torch.Generator()))
        return replace(update, adapter=sent.adapter)

    Worker.train = _poisoned
