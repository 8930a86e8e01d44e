"""How the host NPU comes about: the vendor's wheel, stub libraries, the environment of a child, what can be lacking.

Nothing here needs the network: where the wheel itself is needed and cannot be had, the test is skipped with the
reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from host_npu_child import host_npu_variables, on_host_npu

from ospnext.conformance.host_npu import HostNpuUnavailableError, elf, launch, stubs, wheel
from ospnext.conformance.host_npu.__main__ import USAGE
from ospnext.errors import ConfigError

RELEASE = wheel.RELEASES["2.13.0"]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture
def package() -> wheel.Package:
    host_npu_variables()
    return wheel.package(wheel.release_for_torch())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the release."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = wheel.cache_folder(RELEASE)
    folder.mkdir(parents=True)
    return folder


# ---- which torch


def pretend_torch(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, cuda: str | None = None) -> None:
    (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\nhip = None\nxpu = None\n")
    monkeypatch.setattr(wheel, "torch_folder", lambda: folder)


def test_a_torch_for_another_accelerator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, tmp_path, "2.13.0+cu128", cuda="12.8")
    with pytest.raises(
        HostNpuUnavailableError, match=r"CPU build.*2\.13\.0\+cu128 is built for cuda 12\.8.*pip install"
    ):
        wheel.release_for_torch()


def test_an_unknown_version_of_torch_is_told_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torch(monkeypatch, tmp_path, "2.9.1+cpu")
    with pytest.raises(HostNpuUnavailableError, match=r"for torch 2\.9\.1\+cpu; it was run with torch 2\.13\.0"):
        wheel.release_for_torch()


@pytest.mark.parametrize("torch", wheel.RELEASES)
def test_each_torch_has_a_torch_npu_of_its_own_release(
    torch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_torch(monkeypatch, tmp_path, f"{torch}+cpu")
    release = wheel.release_for_torch()
    # torch_npu is linked with one release of torch; what it adds to the number is its own.
    assert release.version.partition(".post")[0] == torch
    assert f"torch_npu-{release.version}-" in wheel.cache_folder(release).name


def test_a_python_or_machine_without_a_wheel_is_told_which_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_torch(monkeypatch, tmp_path, "2.13.0+cpu")
    monkeypatch.setattr(wheel, "RELEASES", {"2.13.0": replace(RELEASE, pythons=("3.8", "3.9"))})
    with pytest.raises(HostNpuUnavailableError, match=r"no wheel for Python 3\.\d+, but for 3\.8, 3\.9"):
        wheel.release_for_torch()
    monkeypatch.setattr(wheel, "RELEASES", {"2.13.0": replace(RELEASE, pythons=(TAG.replace("cp3", "3."),))})
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HostNpuUnavailableError, match="no wheel for linux on riscv64, but for linux on x86_64 and"):
        wheel.release_for_torch()


# ---- the wheel


def test_an_index_out_of_reach_is_told_with_the_way_around(cache: Path) -> None:
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    others = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [sys.executable, "-m", "ospnext.conformance.host_npu", "-c", "print('ran')"],
        env={**others, **unreachable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "installed" in done.stderr or "wheel for" in done.stderr or "CPU build" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"pip download --no-deps --only-binary=:all: --dest {cache}" in done.stderr
    assert f"torch_npu=={RELEASE.version}" in done.stderr
    assert (
        f"put torch_npu-{RELEASE.version}-{TAG}-{TAG}-manylinux_2_28_{platform.machine()}.whl into {cache}"
        in done.stderr
    )
    assert list(cache.iterdir()) == []


def write_wheel(folder: Path) -> Path:
    path = folder / f"torch_npu-{RELEASE.version}-{TAG}-{TAG}-manylinux_2_28_{platform.machine()}.whl"
    info = f"torch_npu-{RELEASE.version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch_npu/__init__.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {RELEASE.version}\n")
        archive.writestr(f"{info}/entry_points.txt", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return path


def entry_points_seen_with(folder: Path) -> list[tuple[str, str]]:
    found = importlib.metadata.entry_points  # of this process's path
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return [(point.name, point.value) for point in found(group="torch.backends")]


OURS = [("ospnext_host_npu", "ospnext.conformance.host_npu.autoload:activate")]


def test_a_wheel_placed_by_hand_is_used_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is installed here, so that no wheel is looked for")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: pytest.fail("it was downloaded"))
    placed = write_wheel(cache)
    found = wheel.package(RELEASE)
    assert (found.site, found.folder) == (cache / "site", cache / "site" / "torch_npu")
    assert (found.folder / "__init__.py").exists()
    assert entry_points_seen_with(found.site) == OURS
    assert sorted(path.name for path in cache.iterdir()) == ["site", placed.name]
    next(found.site.glob("*/entry_points.txt")).write_text("[torch.backends]\nolder = older:activate\n")
    wheel.package(RELEASE)
    assert entry_points_seen_with(found.site) == OURS


def test_an_installed_package_is_used_where_it_is(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(write_wheel(tmp_path)) as archive:
        archive.extractall(installed)
    monkeypatch.syspath_prepend(str(installed))
    found = wheel.package(RELEASE)
    assert (found.folder, found.site) == (installed / "torch_npu", cache / "entry_point")
    assert entry_points_seen_with(found.site) == OURS
    with pytest.raises(
        HostNpuUnavailableError, match=r"torch_npu 2\.13\.0 is installed in .*installed, and the host NPU"
    ):
        wheel.package(replace(RELEASE, version="2.14.0"))


# ---- the stub libraries


@pytest.mark.skipif(shutil.which("nm") is None, reason="compares with binutils: apt install binutils")
def test_symbols_are_those_that_binutils_see(package: wheel.Package) -> None:
    for path in (package.folder / "lib" / "libtensorpipe.so", stubs.stub_libraries(package) / "libascendcl.so"):
        found = elf.read(path)

        def listed(*options: str, path: Path = path) -> str:
            return subprocess.run((*options, str(path)), capture_output=True, text=True, check=True).stdout

        undefined = [line.split() for line in listed("nm", "-D", "--undefined-only").splitlines()]
        assert found.undefined == {words[-1].split("@")[0] for words in undefined if words[0] == "U"}
        defined = [line.split()[-1].split("@")[0] for line in listed("nm", "-D", "--defined-only").splitlines()]
        assert found.defined == {*defined}
        needed = [line.split("[")[1].rstrip("]") for line in listed("readelf", "-d").splitlines() if "(NEEDED)" in line]
        assert found.needed == (*needed,)


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libx.so").write_text("INPUT(-lx)")
    with pytest.raises(ConfigError, match=r"libx\.so is no 64-bit little-endian ELF"):
        elf.read(tmp_path / "libx.so")


def test_the_package_asks_for_what_was_counted(package: wheel.Package) -> None:
    hard = stubs.hard_symbols(package)
    assert len(hard) == {"2.11.0.post3": 80, "2.12.0.post3": 80, "2.13.0": 84, "2.14.0": 84}[package.release.version]
    for changed in (hard | {"aclrtNew"}, hard - {"aclrtMalloc"}, (hard - {"aclrtMalloc"}) | {"_ZN2ge5GraphC1Ev"}):
        with pytest.raises(ConfigError, match=rf"asks CANN for {len(changed)} functions.*another build"):
            stubs._check(changed, package)


def test_no_stub_pretends_to_be_an_operator(package: wheel.Package) -> None:
    exported = elf.read(stubs.stub_libraries(package) / "libascendcl.so").defined
    assert not [name for name in exported if name.startswith("aclnn")]
    assert "ospnext_host_npu" in exported
    assert stubs.hard_symbols(package) <= exported


def test_what_has_no_body_fails_when_it_is_called(package: wheel.Package) -> None:
    text = stubs.source_text(stubs.BODIES.read_text(encoding="utf-8"), {"aclInit", "rtKernelLaunch", "aclAppLog"})
    assert text.endswith("int rtKernelLaunch(void) { return 207000; }\n")
    assert text.count("aclInit(") == text.count("(aclAppLog)") == 1


def test_without_a_compiler_it_is_asked_for(
    package: wheel.Package, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(HostNpuUnavailableError, match="no cc, gcc or clang on PATH"):
        stubs.stub_libraries(package)
    assert list(cache.iterdir()) == []


def test_a_source_that_does_not_compile_leaves_nothing(
    package: wheel.Package, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("int aclInit(\n")
    monkeypatch.setattr(stubs, "BODIES", broken)
    with pytest.raises(ConfigError, match="do not compile"):
        stubs.stub_libraries(package)
    assert list(cache.iterdir()) == []


def test_a_changed_generator_makes_new_libraries(
    package: wheel.Package, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stubs.stub_libraries(package)
    built = (first / "libascendcl.so").stat().st_mtime_ns
    assert stubs.stub_libraries(package) == first
    assert (first / "libascendcl.so").stat().st_mtime_ns == built
    changed = tmp_path / "changed.c"
    changed.write_text(stubs.BODIES.read_text(encoding="utf-8") + "int added(void) { return 0; }\n", encoding="utf-8")
    monkeypatch.setattr(stubs, "BODIES", changed)
    second = stubs.stub_libraries(package)
    assert second != first
    assert "added" in elf.read(second / "libascendcl.so").defined


def test_processes_that_build_at_once_end_with_one_folder(package: wheel.Package, cache: Path) -> None:
    code = "from ospnext.conformance.host_npu import stubs, wheel\nfrom pathlib import Path\nimport sys\n"
    code += "found = wheel.Package(wheel.release_for_torch(), Path(sys.argv[1]), Path(sys.argv[2]))\n"
    code += "print(stubs.stub_libraries(found))"
    command = [sys.executable, "-c", code, str(package.site), str(package.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), ended
    folders = {out.strip() for out, _ in ended}
    assert len(folders) == 1
    assert [str(path) for path in cache.iterdir()] == [*folders]
    assert {path.name for path in Path(folders.pop()).glob("*.so")} == {*stubs.LIBRARIES}


def test_a_cache_that_cannot_be_written_is_named(
    package: wheel.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write to .*file/ospnext.*XDG_CACHE_HOME"):
        stubs.stub_libraries(package)


# ---- the environment and programs in it


def test_an_installed_cann_is_kept_out(package: wheel.Package, tmp_path: Path) -> None:
    (tmp_path / "libascendcl.so").write_text("")
    inherited = {
        "ASCEND_HOME_PATH": "/usr/local/Ascend",
        "LD_LIBRARY_PATH": f"{tmp_path}:/somewhere",
        "PYTHONPATH": "/mine",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "KEPT": "1",
    }
    made = launch.environment(inherited)
    assert made["KEPT"] == made["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    assert "ASCEND_HOME_PATH" not in made
    assert made["PYTHONPATH"] == f"{package.site}:/mine"
    assert made["LD_LIBRARY_PATH"] == f"{stubs.stub_libraries(package)}:/somewhere"
    assert launch.environment(made) == made
    assert inherited["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_a_program_is_started_as_python_would(package: wheel.Package, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(sys.argv[1:], os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])\nsys.exit(3)\n")

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ospnext.conformance.host_npu", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    for done in (start(str(script), "-x", "y"), start("-c", script.read_text(), "-x", "y")):
        assert (done.returncode, done.stdout) == (3, "['-x', 'y'] 1\n"), done.stderr
    assert start("-m", "platform").returncode == 0
    assert USAGE in start("--help").stdout
    assert (start().returncode, start().stderr.strip()) == (2, USAGE)
    assert launch.run(["-c", "import sys; sys.exit(5)"]) == 5
    assert launch.run(["-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.parametrize("soc", ["Ascend910B4", "Ascend910_9392"])
def test_other_chips_can_be_played(soc: str) -> None:
    code = "import torch; x = torch.ones(2, device='npu'); print(torch.npu.get_device_name(), (x @ x).item())"
    done = on_host_npu("-c", code, HOST_NPU_SOC=soc, HOST_NPU_COUNT="2")
    assert done.stdout == f"{soc} 2.0\n", done.stderr


def test_a_process_sees_the_npus_that_it_is_shown() -> None:
    """Those before the first that there is not."""
    code = "import torch; print(torch.npu.device_count())"
    assert on_host_npu("-c", code, ASCEND_RT_VISIBLE_DEVICES="1,3,8,9").stdout == "2\n"


def test_an_unknown_chip_and_a_wrong_order_of_imports_are_errors() -> None:
    done = on_host_npu("-c", "import torch; torch.ones(2, device='npu')", HOST_NPU_SOC="Ascend1")
    assert "Unsupported soc version: Ascend1" in done.stderr
    done = on_host_npu("-c", "import torch_npu, torch; torch.ones(2, device='npu')")
    assert "`import torch`, which has to stand before `import torch_npu`" in done.stderr
