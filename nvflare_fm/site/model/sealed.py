"""Between a site's adapter and one that the server adds unread: pairs of one rank and scale, A as the seed has it."""

from ...adapter import LORA_B, Adapter, LoraPair
from ...algebra.lora import fresh_rows, refill
from ...config import TaskPlan
from ...encryption.keys import Keys
from ...errors import ConfigError, WireError
from ...transforms.packed import Sealed


def padded(whole: Adapter, plan: TaskPlan) -> Adapter:
    """The same adapter at the rank and scale that all sites send.

    Args:
        whole: what the site trained and what rode along frozen. Its A is that of the plan's seed, so what is missing
            gets zero columns of B.

    Raises:
        ConfigError: it has a larger rank.
    """
    if any(whole.lora[layer].rank > plan.padded_to for layer in whole.lora):
        raise ConfigError(
            "this site trains at a larger rank than the global adapter can have, and could not be added; lower its "
            "rank, or raise max_rank",
            code="rank_above_global",
        )
    ones = {layer: whole.lora[layer].rescaled(1.0) for layer in whole.lora}
    return Adapter({n: refill(pair, plan.padded_to, n, plan.seed) for n, pair in ones.items()}, whole.dense)


def unsealed(adapter: Adapter, keys: Keys | None, plan: TaskPlan) -> Adapter:
    """Decrypt the global adapter. Its A is not in it and follows from the seed.

    Args:
        adapter: encrypted; any other is given back as it is.
        keys: the site's.
        plan: by which the sites have trained it.

    Raises:
        ConfigError: the site has no keys.
        WireError: it is no sum of updates under them, or of another rank than the plan says.
    """
    if not isinstance(adapter, Sealed):
        return adapter
    found, lora = adapter.packed.opened(keys), {}
    for layer in adapter.lora:
        b, fan_in = found[layer + LORA_B], adapter.lora[layer].shape[1]
        if b.shape[1] != plan.padded_to:
            raise WireError(
                f"the global adapter has rank {b.shape[1]} in {layer!r}, the plan says {plan.padded_to}; update "
                "nvflare_fm at the server",
                code="rank_not_in_plan",
            )
        lora[layer] = LoraPair(fresh_rows(layer, fan_in, range(plan.padded_to), plan.seed), b)
    dense = {name: tensor for name, tensor in found.items() if name.removesuffix(LORA_B) not in lora}
    return Adapter(lora, dense)
