"""Startup kits that accept this package: a builder for `project.yml`, and the same for kits that exist already.

    builders:
      - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
      - path: nvflare.lighter.impl.static_file.StaticFileBuilder
      - path: nvflare_fm.flare.provision.FmBuilder          # here: after the files it adds to, before they are signed
        args: {forbid_byoc: true, only_ours: true}
      - path: nvflare.lighter.impl.cert.CertBuilder
      - path: nvflare.lighter.impl.signature.SignatureBuilder

A participant's property `fm_site` is what its `local/fm_site.yaml` is to say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import ParticipantType, PropKey, ProvFileName
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.spec import Builder

from ..errors import ConfigError
from ..site.offer import secret, site_file
from ..site.offer.policy import BOUNDS
from ..site.offer.site_config import FILE_NAME, SiteConfig, load_site
from . import components
from .kit import allow_list, job_check

PROPERTY, README, CAPABILITIES = "fm_site", "readme_nvflare_fm.txt", "nvflare_fm"

_README = """\
nvflare_fm at {name}
{underline}
This kit lets jobs fine-tune language models here with adapters (LoRA and its kin). What it adds to NVFlare's own kit:

  local/{resources}   class_allow_list names what a job may build here:
{listed}
                        This is code of the Python packages that IT installs here. The list names classes one by one;
                        {besides}
  local/{check}
                        checks a job's files before anything parses them, and writes a line about every job to
                        audit.log: who submitted it, and whether it was accepted or why not.
  local/{site_file}       which models and data exist here under which alias, limits, who is welcome. Yours to edit.

Before the first job
  1. pip install "nvflare_fm[site]" into the Python that start.sh finds. Your installed copy decides what runs.
  2. Edit local/{site_file}; each setting is explained in it. Until it names whom it welcomes, every job is refused.
  3. nvflare-fm site check        loads the model, reads the data, trains one step, says what is wrong and what to do.

What leaves this site: the adapter's tensors, metrics of enough rows, the counts that local/{site_file} lets
out, settings and times of each round, and the reason when the site refuses. Never rows, texts, paths or host names,
nor local/{secret}, which decides the order of the rows. The package's page "Prepare a site" says what an adapter
tells all the same. Error logs may hold paths, and NVFlare sends them to the server unless told otherwise:
allow_log_streaming is {streaming}.
The Python package "kernels" must not be installed here: with it, bitsandbytes fetches code from the Hugging Face hub
when it is imported on a CPU with AVX512-BF16.
Every job is in audit.log, and every decision on its tasks in the audit.log of the job's own folder, with the reason.
A job whose files take values from elsewhere (include, ${{NAME}}, {{$NAME}}) is refused: they would be read here.
To take all this out again: nvflare-fm site allow --remove
"""


class FmBuilder(Builder):
    """Prepares the kits of the server and of every client.

    Args:
        forbid_byoc: no role may submit jobs that bring code, at the server and at every client.
        only_ours: jobs may build our components and what ours need of NVFlare, and none of NVFlare's other default
            components, some of which read, write or send what a job tells them to.
    """

    def __init__(self, forbid_byoc: bool = False, only_ours: bool = False) -> None:
        super().__init__()
        self.forbid_byoc, self.only_ours = forbid_byoc, only_ours

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Write into each kit what our components need.

        Raises:
            ConfigError: it is listed before StaticFileBuilder, or a participant's `fm_site` has an unknown setting.
        """
        server = project.get_server()
        self._prepare_local(server, ctx)
        for client in project.get_clients():
            streaming = client.get_prop_fb(PropKey.ALLOW_LOG_STREAMING, default=False)
            self._prepare_local(client, ctx, {PropKey.ALLOW_LOG_STREAMING: bool(streaming)})
            local = Path(ctx.get_local_dir(client))
            prepare_site(local, client.get_prop(PROPERTY) or {}, client.name)
            write_readme(local.parent / README, client.name)

    def _prepare_local(
        self, participant: Participant, ctx: ProvisionContext, more: Mapping[str, Any] | None = None
    ) -> None:
        local = Path(ctx.get_local_dir(participant))
        file = local / allow_list.DEFAULT
        if not file.exists():
            raise ConfigError(
                "in project.yml, list nvflare_fm's builder after StaticFileBuilder and before CertBuilder",
                code="builder_order",
            )
        resources = allow_list.load(file) | dict(more or {})
        is_site = participant.type == ParticipantType.CLIENT
        allow_list.write(file, _allowing(resources, is_site, self.only_ours))
        job_check.install(local, is_site)
        if self.forbid_byoc:
            rules = local / ProvFileName.AUTHORIZATION_JSON_DEFAULT
            allow_list.write(rules, without_byoc(allow_list.load(rules)))


def _allowing(resources: Mapping[str, Any], is_site: bool, only_ours: bool) -> dict[str, Any]:
    at_site = components.NVFLARE_STREAMING_SITE if streams_logs(resources) else components.NVFLARE_SITE
    ours, nvflares = (components.SITE, at_site) if is_site else (components.SERVER, components.NVFLARE_SERVER)
    return allow_list.with_ours(resources, ours, nvflares if only_ours else None)


def without_byoc(authorization: Mapping[str, Any]) -> dict[str, Any]:
    """NVFlare's authorization rules with the right `byoc` taken from every role, and no other."""
    roles = authorization["permissions"]
    rights = {right: "any" for rules in roles.values() if isinstance(rules, dict) for right in rules}
    spelt = {role: rules if isinstance(rules, dict) else dict.fromkeys(rights, rules) for role, rules in roles.items()}
    return {**authorization, "permissions": {role: {**rules, "byoc": "none"} for role, rules in spelt.items()}}


def prepare_site(local: Path, values: Mapping[str, Any], name: str) -> None:
    """Writes the site file, unless the site has one, and what NVFlare is to tell the server of it.

    Raises:
        ConfigError: a setting nobody knows.
    """
    file = local / FILE_NAME
    SiteConfig.read(values, f"{PROPERTY} of {name}")
    if not file.exists():
        file.write_text(site_file.render(values))
    resources, content = allow_list.read(local)
    allow_list.write(resources, {**content, CAPABILITIES: capabilities(load_site(file))})


def capabilities(config: SiteConfig) -> dict[str, Any]:
    """What NVFlare tells the server as the site's `site_config`: limits, and no alias, path or name."""
    limits = config.limits
    told = {bound.limit: getattr(limits, bound.limit) for bound in BOUNDS}
    return told | {"memory_gib": limits.memory_gib, "quantizations": list(limits.quantizations)}


def streams_logs(resources: Mapping[str, Any]) -> bool:
    """Whether the site sends its error logs to the server; NVFlare does unless told otherwise."""
    return bool(resources.get(PropKey.ALLOW_LOG_STREAMING, True))


def write_readme(file: Path, name: str) -> None:
    """Writes what the kit's owner needs to know, for a kit that is prepared otherwise."""
    _, resources = allow_list.read(file.parent / "local")
    title, others = f"nvflare_fm at {name}", len(allow_list.others(resources, components.NVFLARE_SITE))
    beside = f"besides, {others} of NVFlare's and others." if others else "of NVFlare's own, only what ours need."
    file.write_text(
        _README.format(
            name=name,
            underline="=" * len(title),
            resources=allow_list.DEFAULT,
            listed="\n".join(f"                          {entry}" for entry in components.SITE),
            besides=beside,
            check=job_check.FILE,
            site_file=FILE_NAME,
            secret=secret.NAME,
            streaming="on: they go to the server" if streams_logs(resources) else "off: they stay here",
        )
    )


def allow(kit: Path, only_ours: bool = False) -> list[Path]:
    """Prepares a kit that exists already, of a server or a site, and returns what it wrote. Harmless when repeated.

    A site's error logs, which may hold paths, stay there from now on; a site that turns them on again after is obeyed.
    An older kit's entry for the whole package gives way to the single components.

    Args:
        only_ours: see `FmBuilder`.

    Raises:
        ConfigError: the folder is no startup kit, its site file has a setting nobody knows, or the site has a component
            of its own where ours must be.
    """
    local, is_site = _local(kit), is_of_site(kit)
    _, before = allow_list.read(local)
    if is_site and CAPABILITIES not in before:
        before[PropKey.ALLOW_LOG_STREAMING] = False
    check = job_check.install(local, is_site)
    written = allow_list.write(local / allow_list.OWN, _allowing(before, is_site, only_ours))
    if not is_site:
        return [written, check]
    prepare_site(local, {}, kit.name)
    write_readme(kit / README, kit.name)
    secret.make(local / FILE_NAME)  # here and not by the builder: whoever makes the kits would know it
    return [written, check, local / FILE_NAME, local / secret.NAME, kit / README]


def is_of_site(kit: Path) -> bool:
    """Whether a startup kit is a site's, and not the server's or a user's."""
    return (kit / "startup" / ProvFileName.FED_CLIENT_JSON).exists()


def remove(kit: Path) -> list[Path]:
    """Takes out what `allow` or the builder put in; the site file is kept under another name, for it is the site's own.

    Error logs are sent or kept again as the kit that came from the project's admin says.

    Raises:
        ConfigError: the folder is no startup kit.
    """
    local = _local(kit)
    changed = allow_list.disallow(local)
    came_with = allow_list.load(local / allow_list.DEFAULT).get(PropKey.ALLOW_LOG_STREAMING)
    for file in (local / allow_list.OWN, local / allow_list.DEFAULT):
        resources = allow_list.load(file)
        if resources.pop(CAPABILITIES, None):
            if came_with is not None:
                resources[PropKey.ALLOW_LOG_STREAMING] = came_with
            changed.append(allow_list.write(file, resources))
    if (local / FILE_NAME).exists():
        changed.append((local / FILE_NAME).rename(local / f"{FILE_NAME}.removed"))
    for ours in (kit / README, local / secret.NAME, local / job_check.FILE):
        if ours.exists():
            ours.unlink()
            changed.append(ours)
    return sorted(set(changed))


def _local(kit: Path) -> Path:
    if not (kit / "local").is_dir() or not (kit / "startup").is_dir():
        raise ConfigError("this is no startup kit: it needs the folders startup and local", str(kit), code="not_a_kit")
    return kit / "local"
