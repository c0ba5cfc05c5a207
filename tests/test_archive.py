"""Downloading and unpacking archives, against a real server on this machine."""

import contextlib
import gzip
import hashlib
import http.server
import io
import pathlib
import random
import re
import resource
import shutil
import socket
import tarfile
import threading
import time

import pytest

from speech_jax.data.sources import archive

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; `ranges` says whether it resumes, `cuts` after how many bytes it hangs up."""

    def __init__(self, ranges=True, cuts=(), status=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges, self.cuts, self.fail = ranges, list(cuts), status
        self.requests: list[str] = []  # the Range of each request, '' without one
        self.url = f"http://127.0.0.1:{self.server_port}/split.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers.get("Range", "")
        self.server.requests.append(asked)
        if self.server.fail != 200:
            self.send_error(self.server.fail)
            return
        start = 0
        if asked and self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        sent = self.server.cuts.pop(0) if self.server.cuts else len(CONTENT)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(CONTENT[start : start + sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:

        def start(**kwargs) -> Server:
            server = Server(**kwargs)
            stack.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def target(tmp_path) -> pathlib.Path:
    return tmp_path / "split.tar.gz"


def files(folder: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_download_is_whole_and_leaves_nothing_else(serve, target):
    archive.download(serve().url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert files(target.parent) == ["split.tar.gz"]


def test_a_part_is_resumed(serve, target):
    server = serve()
    target.with_name("split.tar.gz.part").write_bytes(CONTENT[:100_000])
    archive.download(server.url, target, MD5)
    assert server.requests == ["bytes=100000-"]
    assert target.read_bytes() == CONTENT


def test_a_part_that_is_whole_is_only_checked(serve, target):
    server = serve()
    target.with_name("split.tar.gz.part").write_bytes(CONTENT)
    archive.download(server.url, target, MD5)
    assert server.requests == [f"bytes={len(CONTENT)}-"]
    assert target.read_bytes() == CONTENT


def test_a_server_that_cannot_resume_starts_over(serve, target):
    target.with_name("split.tar.gz.part").write_bytes(b"something else" * 9)
    archive.download(serve(ranges=False).url, target, MD5)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_cut_midway_is_taken_up_again(serve, target, ranges):
    server = serve(ranges=ranges, cuts=[200_000, 150_000])
    archive.download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    expected = ["", "bytes=200000-", "bytes=350000-"] if ranges else ["", "bytes=200000-"]
    assert server.requests[: len(expected)] == expected


def test_a_connection_that_is_cut_often_but_gets_further_goes_on(serve, target):
    server = serve(cuts=[50_000] * 10)
    archive.download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 11


def test_a_connection_that_gets_no_further_ends_with_the_part_kept(serve, target):
    server = serve(cuts=[200_000] + [0] * 20)
    with pytest.raises(archive.ArchiveError, match=r"keeps breaking .* run the command again"):
        archive.download(server.url, target, MD5)
    assert files(target.parent) == ["split.tar.gz.part"]
    server.cuts = []
    archive.download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT


def test_a_wrong_checksum_removes_the_download(serve, target):
    with pytest.raises(archive.ArchiveError, match=f"checksum {MD5} in place of 0123"):
        archive.download(serve().url, target, "0123")
    assert files(target.parent) == []


def test_a_refusal_names_the_status(serve, target):
    with pytest.raises(archive.ArchiveError, match="the server answered 404 Not Found"):
        archive.download(serve(status=404).url, target, MD5)
    assert files(target.parent) == []


def test_without_a_network_the_error_names_the_host(target):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/split.tar.gz"
        with pytest.raises(archive.ArchiveError, match=r"no connection to 127\.0\.0\.1:"):
            archive.download(url, target, MD5)
    assert files(target.parent) == []


def test_a_disk_that_fills_up_is_an_error_and_the_rest_can_follow(serve, target):
    server = serve()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(archive.ArchiveError, match=r"cannot write .* make room"):
            archive.download(server.url, target, MD5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not target.exists()
    archive.download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_an_error(serve, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(archive.ArchiveError, match="cannot write"):
        archive.download(serve().url, tmp_path / "file" / "split.tar.gz", MD5)


def test_of_two_that_want_a_file_one_downloads_it(serve, target):
    server = serve()
    errors = []

    def fetch():
        try:
            archive.download(server.url, target, MD5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, server.requests) == ([], [""])
    assert files(target.parent) == ["split.tar.gz"]


def test_the_official_archives_are_listed():
    expected = {"dev-clean", "dev-other", "test-clean", "test-other", "dev-clean-2"}
    expected |= {"train-clean-5", "train-clean-100", "train-clean-360", "train-other-500"}
    assert set(archive.ARCHIVES) == expected
    for name, (url, md5) in archive.ARCHIVES.items():
        assert re.fullmatch(rf"https://www\.openslr\.org/resources/(12|31)/{name}\.tar\.gz", url)
        assert re.fullmatch(r"[0-9a-f]{32}", md5)


# ---- Unpacking ---------------------------------------------------------------------------------


def member(
    name: str, content: bytes = b"1-2-0000 TEXT\n", **kwargs
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in kwargs.items():
        setattr(info, key, value)
    info.size = len(content) if info.isfile() else 0
    return info, content


def pack(path: pathlib.Path, *members) -> pathlib.Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("prefix", ["split/", "LibriSpeech/split/", "", "./split/"])
def test_the_split_is_found_wherever_the_archive_has_it(tmp_path, prefix):
    readme = member("LibriSpeech/README.TXT", b"about")
    file = pack(tmp_path / "a.tar.gz", readme, member(f"{prefix}1/2/1-2.trans.txt"))
    archive.extract(file, tmp_path / "root" / "split")
    assert (tmp_path / "root/split/1/2/1-2.trans.txt").read_bytes() == b"1-2-0000 TEXT\n"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["split"]


LINK = "link, device or sparse"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("../outside.txt"), r"'\.\./outside\.txt' would .* outside the dest"),
        (member("split/../../outside.txt"), "outside the destination"),
        (member("/tmp/outside.txt"), "'/tmp/outside.txt' points outside"),
        (
            member("split/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            LINK,
        ),
        (
            member("split/link", type=tarfile.SYMTYPE, linkname="../../outside"),
            LINK,
        ),
        (
            member("split/link", type=tarfile.LNKTYPE, linkname="../outside"),
            LINK,
        ),
        (member("split/pipe", type=tarfile.FIFOTYPE), LINK),
        (
            member("split/device", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            LINK,
        ),
    ],
)
def test_an_unsafe_archive_is_refused_and_nothing_unpacked(tmp_path, bad, message):
    root = tmp_path / "root"
    file = pack(tmp_path / "a.tar.gz", member("split/1/2/1-2.trans.txt"), bad)
    with pytest.raises(archive.ArchiveError, match=message):
        archive.extract(file, root / "split")
    assert files(tmp_path) == ["a.tar.gz", "root"]


def test_a_damaged_archive_is_an_error_and_nothing_unpacked(tmp_path):
    # Two files, so that a good one is there before the damage.
    noise = random.Random(0).randbytes(100_000)
    good = pack(tmp_path / "a.tar.gz", member("split/1/2/1-2.trans.txt"), member("split/b", noise))
    content = good.read_bytes()
    flipped = content[:5000] + bytes([content[5000] ^ 255]) + content[5001:]
    for damaged in (content[:50_000], content[:5], b"", b"plain text", flipped):
        good.write_bytes(damaged)
        with pytest.raises(archive.ArchiveError, match=r"damaged or no \.tar\.gz"):
            archive.extract(good, tmp_path / "root" / "split")
        assert files(tmp_path) == ["a.tar.gz", "root"]


def test_an_archive_of_something_else_is_an_error(tmp_path):
    file = pack(tmp_path / "a.tar.gz", member("other/1/2/1-2.trans.txt"))
    with pytest.raises(archive.ArchiveError, match="holds no transcripts split/"):
        archive.extract(file, tmp_path / "root" / "split")
    assert files(tmp_path) == ["a.tar.gz", "root"]


def test_a_split_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "mine").write_text("kept")
    archive.extract(
        pack(tmp_path / "a.tar.gz", member("split/1/2/1-2.trans.txt")), tmp_path / "split"
    )
    assert files(tmp_path) == ["a.tar.gz", "split", "split/mine"]


def tar(count: int, start: int = 0) -> bytes:
    """A plain archive of two members for each of `count` chapters."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for number in range(start, start + count):
            for name in (f"{number}-1.trans.txt", f"{number}-1-0.flac"):
                info, content = member(f"split/{number}/1/{name}")
                out.addfile(info, io.BytesIO(content))
    return file.getvalue()


def sparse() -> bytes:
    """An archive whose last member is 200 MiB of zeros in no bytes (GNU's sparse format)."""
    header = bytearray(member("split/1/1/s", bytes(512))[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:410] = b"%011o\0%011o\0" % (0, 512)
    header[483:495] = b"%011o\0" % (200 << 20)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar(1)[:2048] + bytes(header) + bytes(1536)


def flipped() -> bytes:
    data = bytearray(tar(20))
    data[512 * 40 + 5] ^= 1
    return bytes(data)


def odd(name: str, **headers: str) -> bytes:
    """An archive of one member with PAX headers of its own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        info, content = member(name)
        info.pax_headers = {key.replace("_", "."): value for key, value in headers.items()}
        out.addfile(info, io.BytesIO(content))
    return file.getvalue()


BROKEN = {
    "one bit of a header": (flipped(), "no header at byte 20,480"),
    "cut between members": (tar(20)[: 512 * 40], "no header at byte"),
    "cut in a header": (tar(20)[: 512 * 40 + 100], "no header at byte"),
    "cut in a file": (tar(20)[: 512 * 41 + 5], "is damaged"),
    "a second archive": (tar(3) + tar(3, 50), "another archive, or something else, follows"),
    "sparse": (sparse(), LINK),
    "a sparse map of letters": (odd("split/1/1/a", GNU_sparse_map="a,b"), "is damaged"),
    "a sparse size of letters": (odd("split/1/1/a", GNU_sparse_size="x"), "is damaged"),
    "1,500 folders deep": (odd("split/" + "n/" * 1500 + "a"), "is damaged|cannot unpack"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_archive_that_is_not_whole_is_an_error_and_nothing_unpacked(tmp_path, name):
    content, message = BROKEN[name]
    file = tmp_path / "a.tar.gz"
    file.write_bytes(gzip.compress(content))
    with pytest.raises(archive.ArchiveError, match=message) as caught:
        archive.extract(file, tmp_path / "root" / "split")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == ["a.tar.gz", "root"]


def test_an_archive_larger_than_the_room_is_refused_before_it_is_full(tmp_path, monkeypatch):
    file = pack(tmp_path / "a.tar.gz", member("split/1/1/1-1.trans.txt", bytes(5000)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4999))
    with pytest.raises(archive.ArchiveError, match=r"cannot write .* needs more\); make room"):
        archive.extract(file, tmp_path / "root" / "split")
    assert files(tmp_path) == ["a.tar.gz", "root"]


def test_of_several_that_want_a_split_one_unpacks_it(tmp_path, monkeypatch):
    file = pack(tmp_path / "a.tar.gz", member("split/1/2/1-2.trans.txt"))
    unpacked, errors = [], []
    unpack = archive._unpack

    def slowly(*args):
        unpacked.append(1)
        time.sleep(0.2)
        unpack(*args)

    def fetch():
        try:
            archive.extract(file, tmp_path / "root" / "split")
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(archive, "_unpack", slowly)
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(unpacked), errors) == (1, [])
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["split"]
