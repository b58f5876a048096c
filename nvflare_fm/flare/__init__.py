"""The shell: carries messages between NVFlare and the core. The only importer of nvflare."""
