"""The packages that `cuda_acceptance.py` needs beside torch, as a folder of wheels: for a machine without an index.

python benchmarks/cuda_acceptance.py wheels FOLDER    # where there is an index: makes the folder
python benchmarks/cuda_acceptance.py correctness --wheels FOLDER
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("llama", "transformers")  # what is imported; of "llama" there is no wheel, since it is used from its folder
FROM_SOURCE = ("fairscale",)  # which has no wheels; the extensions in C++ aren't needed, nor compiled by default
MINOR_VERSIONS_OF_GLIBC = range(17, 35)  # pip takes only wheels of exactly those platforms that it is given


def make_wheels(folder: Path, python_version: str, packages: tuple[str, ...] = PACKAGES) -> None:
    """Download wheels of the versions installed here, for Linux on x86-64.

    Args:
        folder: where to put them.
        python_version: of the other machine, such as "3.12".
        packages: whose requirements are needed, and they themselves; but not torch, nor what it brings along.
    """
    brought = requirements(("torch",), python_version)
    names = sorted(requirements(packages, python_version) - brought - {"llama"})
    pinned = {name: f"{name}=={importlib.metadata.version(name)}" for name in names}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in MINOR_VERSIONS_OF_GLIBC]
    platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    target = [f"--platform={platform}" for platform in platforms]
    target += [
        f"--python-version={python_version}",
        "--implementation=cp",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    binary = [requirement for name, requirement in pinned.items() if name not in FROM_SOURCE]
    source = [requirement for name, requirement in pinned.items() if name in FROM_SOURCE]
    folder.mkdir(parents=True, exist_ok=True)
    if binary:
        subprocess.run([*pip, "download", "--quiet", "--no-deps", *target, *binary], check=True)
    if source:
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *source], check=True)
    sizes = {file.name: file.stat().st_size / 2**20 for file in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.2f} MiB  {name}")
    print(f"{sum(sizes.values()):6.2f} MiB  in all, for Python {python_version}")


def requirements(packages: tuple[str, ...], python_version: str) -> set[str]:
    """These installed packages, and all that they require, directly and indirectly, on Linux on x86-64."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    names: set[str] = set()
    pending = list(packages)
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in names:
            names.add(name)
            for text in importlib.metadata.requires(name) or ():
                requirement = Requirement(text)
                # torch's libraries for CUDA are not installed with its CPU build, and not looked for.
                if requirement.marker is None or requirement.marker.evaluate(environment):
                    pending.append(requirement.name)
    return names


def install_wheels(folder: Path, target: Path) -> None:
    """Unpack a folder of wheels, so that this process and those that it starts import from them first."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    for wheel in wheels:
        shutil.unpack_archive(wheel, target, "zip")
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))
