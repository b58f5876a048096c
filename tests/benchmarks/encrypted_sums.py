"""Encrypted sums: processor seconds, bytes and error, beside NVFlare's own HE filters on the same tensors.

    nice python tests/benchmarks/encrypted_sums.py                  MiniLM at rank 8, and 42 M parameters
    nice python tests/benchmarks/encrypted_sums.py --only MiniLM --repeats 9

Random tensors of the shapes that travel: B of every linear layer, and the head. Three sites, at shares 0.2, 0.3 and
0.5; of the large adapter all three send the same, so that it fits into memory. Medians over the repeats, one process.
Nothing is sent: bytes are those of the messages. NVFlare's filters get NumPy arrays, because they fail on tensors.
"""

import argparse
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy
import torch
from nvflare.app_opt.he.decomposers import CKKSVectorDecomposer
from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor

from nvflare_fm import transforms
from nvflare_fm.adapter import LORA_A, Adapter, LoraPair
from nvflare_fm.encryption.keys import Keys
from nvflare_fm.transforms.packed import added, check_sealed, pack
from tests.encryption import kits

Layers = list[tuple[int, int]]
MINILM: Layers = 6 * [*4 * [(384, 384)], (1536, 384), (384, 1536)]
LLAMA: Layers = 32 * [*2 * [(4096, 4096)], *2 * [(1024, 4096)], *2 * [(14336, 4096)], (4096, 14336)]
STUDIES: dict[str, tuple[Layers, int, int, bool]] = {  # layers, rank, numbers of the head, whether the sites differ
    "MiniLM, rank 8": (MINILM, 8, 77 * 385, True),
    "8B, rank 16 (42 M)": (LLAMA, 16, 0, False),
}
SHARES = (0.2, 0.3, 0.5)


def adapter(layers: Layers, rank: int, head: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        f"layer{place:03}": LoraPair(torch.empty(rank, fan_in), 0.01 * torch.randn(fan_out, rank, generator=generator))
        for place, (fan_out, fan_in) in enumerate(layers)
    }
    return Adapter(pairs, {"head": 0.02 * torch.randn(head, generator=generator)} if head else {})


class Clock:
    """Processor seconds of each step, over the repeats; those of another process count, too."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}

    def __call__(self, step: str, do: Callable[[], Any]) -> Any:
        started = sum(os.times()[:4])
        done = do()
        self.took.setdefault(step, []).append(sum(os.times()[:4]) - started)
        return done

    def of(self, step: str) -> float:
        return median(self.took.get(step, [float("nan")]))


def ours(parts: list[Adapter], server: Keys, site: Keys, clock: Clock) -> tuple[int, int, float]:
    """Bytes up and down, and the relative error of the sum."""
    chain = transforms.read(("ckks",), "uplink").keyed(site)
    packed = clock("encrypt", lambda: pack(parts[0], chain, "site-0"))
    sent = [packed.adapter(), *(pack(part, chain, "site").adapter() for part in parts[1:])]
    sent += [sent[0]] * (3 - len(sent))
    clock("check", lambda: check_sealed(server, sent[0], "site-0", apart=True))
    total = clock("add", lambda: added(server, sent, SHARES))
    opened = clock("decrypt", lambda: total.packed.opened(site))
    return sent[0].bytes_sent(), total.bytes_sent(), error(opened, parts)


def error(found: dict[str, Any], parts: list[Adapter]) -> float:
    """‖sum − plain sum‖ / ‖plain sum‖, over all tensors."""
    of, shares = [part.tensors() for part in parts], SHARES if len(parts) == 3 else (1.0,)
    off = size = 0.0
    for name, tensor in found.items():
        plain = sum(share * tensors[name].double() for share, tensors in zip(shares, of, strict=True))
        off += float((torch.as_tensor(tensor).double().flatten() - plain.flatten()).square().sum())
        size += float(plain.square().sum())
    return float((off / size) ** 0.5)


def nvflares(parts: list[Adapter], server: Keys, site: Keys, clock: Clock) -> tuple[int, int, float]:
    """The same with NVFlare's filters: a vector a tensor, and its context with each. The sites weigh, the server adds
    and divides, as `HEInTimeAccumulateWeightedAggregator` does.
    """
    encryptor, decryptor, wire = HEModelEncryptor(weigh_by_local_iter=False), HEModelDecryptor(), CKKSVectorDecomposer()
    del server  # its context comes with each vector
    encryptor.tenseal_context = decryptor.tenseal_context = site.context
    encryptor.encrypt_layers = [True]

    def arrays(part: Adapter) -> dict[str, Any]:
        return {n: t.numpy() for n, t in part.tensors().items() if not n.endswith(LORA_A)}

    def encrypt(part: Adapter, weight: float) -> list[tuple[str, Any]]:
        encryptor.aggregation_weight = weight
        encrypted, _ = encryptor.encryption(arrays(part), None)
        return [(name, wire.decompose(vector)) for name, vector in encrypted.items()]

    def add() -> dict[str, Any]:
        total: dict[str, Any] = {}
        for message in messages:
            for name, (data, context) in message:
                vector = wire.recompose((data, context))
                total[name] = total[name] + vector if name in total else vector
        return {name: vector * (1 / sum(SHARES)) for name, vector in total.items()}

    messages = [clock("encrypt", lambda: encrypt(parts[0], SHARES[0] if len(parts) == 3 else 1 / 3))]
    messages += [encrypt(part, share) for part, share in zip(parts[1:], SHARES[1:], strict=False)]
    messages += [messages[0]] * (3 - len(messages))
    total = clock("add", add)
    down = [(name, wire.decompose(vector)) for name, vector in total.items()]

    def decrypt() -> dict[str, Any]:
        # as received: a vector under the server's context is given the site's
        params = {name: data for name, (data, _) in down}
        return dict(decryptor.decryption(params, dict.fromkeys(params, True), None))

    opened = {name: numpy.array(values) for name, values in clock("decrypt", decrypt).items()}
    up, back = (sum(len(data) + len(context) for _, (data, context) in each) for each in (messages[0], down))
    return up, back, error(opened, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="studies whose name holds this")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    server, site = kits()
    print("| adapter | numbers sent | with | encrypt, s | check, s | add 3, s | decrypt, s | MB up | MB down | error |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (layers, rank, head, differ) in STUDIES.items():
        if given.only not in name:
            continue
        parts = [adapter(layers, rank, head, seed) for seed in range(3 if differ else 1)]
        count = sum(t.numel() for n, t in parts[0].tensors().items() if not n.endswith(LORA_A))
        whole = sum(t.numel() for t in parts[0].tensors().values())
        print(f"| {name}, {whole / 1e6:.3g} M numbers | {count:,} | float32 | | | | | {4 * count / 1e6:.3g} | | |")
        for how, run in (("ours", ours), ("NVFlare's", nvflares)):
            clock = Clock()
            for _ in range(given.repeats):
                up, down, off = run(parts, server, site, clock)
            took = " | ".join(f"{clock.of(step):.3g}" for step in ("encrypt", "check", "add", "decrypt"))
            print(f"| | | {how} | {took} | {up / 1e6:.4g} | {down / 1e6:.4g} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
