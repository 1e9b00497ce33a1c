"""The loopback Hub answers the real client as the Hub does: what it keeps, whom it lets in, how it fails."""

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from hub.server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault, Hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

WEIGHTS = os.urandom(300_000)


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=WRITE_TOKEN)


@pytest.fixture
def quick(monkeypatch):
    """The client's own retries, without its waiting."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    (folder / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "logs" / "events").write_bytes(b"\0\1\2")
    return folder


def requests(hub: Hub, method: str, part: str) -> list:
    return [entry for entry in hub.log if entry.method == method and part in entry.path]


def test_an_uploaded_folder_comes_back_byte_by_byte(hub, api, folder, tmp_path):
    url = api.create_repo("me/model")
    assert (url.repo_id, str(url)) == ("me/model", f"{hub.url}/me/model")
    commit = api.upload_folder(repo_id="me/model", folder_path=folder, commit_message="Weights")

    uploads = {entry.path.split("/")[2] for entry in requests(hub, "PUT", "/_lfs/")}
    large = ("model.safetensors", "plot.png", "logs/events")
    assert uploads == {hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in large}

    copy = snapshot_download("me/model", endpoint=hub.url, cache_dir=tmp_path / "cache")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files("me/model") == files
    for name, content in files.items():
        with open(os.path.join(copy, name), "rb") as file:
            assert file.read() == content

    assert os.path.basename(copy) == commit.oid == api.model_info("me/model").sha
    assert [entry.title for entry in api.list_repo_commits("me/model")] == ["Weights", "initial commit"]


def test_the_second_upload_sends_only_what_is_new(hub, api, folder):
    api.create_repo("me/model")
    first = api.upload_folder(repo_id="me/model", folder_path=folder).oid
    hub.log.clear()
    assert api.upload_folder(repo_id="me/model", folder_path=folder).oid == first
    assert not requests(hub, "PUT", "/_lfs/") and not requests(hub, "POST", "/commit/")

    (folder / "config.json").write_text("{}")
    (folder / "copy.safetensors").write_bytes(WEIGHTS)
    second = api.upload_folder(repo_id="me/model", folder_path=folder).oid
    assert second != first and not requests(hub, "PUT", "/_lfs/")
    assert hub.files("me/model")["copy.safetensors"] == WEIGHTS


def test_revisions_keep_their_whole_tree(hub, api, tmp_path):
    api.create_repo("me/model")
    add = [CommitOperationAdd("a.txt", b"one"), CommitOperationAdd("folder/b.txt", b"two")]
    first = api.create_commit("me/model", add, commit_message="one").oid
    api.create_tag("me/model", tag="v1")
    api.create_branch("me/model", branch="next", revision=first)
    change = [CommitOperationDelete("folder/"), CommitOperationAdd("a.txt", b"three")]
    second = api.create_commit("me/model", change, commit_message="two", parent_commit=first).oid

    assert len(first) == len(second) == 40 and set(hub.files("me/model")) == {"a.txt"}
    for revision in (first, "v1", "next"):
        assert hub.files("me/model", revision=revision) == {"a.txt": b"one", "folder/b.txt": b"two"}
        path = hf_hub_download("me/model", "a.txt", revision=revision, endpoint=hub.url, cache_dir=tmp_path)
        with open(path) as file:
            assert file.read() == "one"
    refs = api.list_repo_refs("me/model")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "next": first}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]

    with pytest.raises(HfHubHTTPError, match="commit has happened since"):
        late = [CommitOperationAdd("a.txt", b"four")]
        api.create_commit("me/model", late, commit_message="late", parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/model", "a.txt", revision="v2", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/model", "folder/b.txt", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.create_commit("me/model", [CommitOperationDelete("b.txt")], commit_message="nothing")
    api.delete_tag("me/model", tag="v1")
    api.delete_branch("me/model", branch="next")
    assert not api.list_repo_refs("me/model").tags


def test_listings_go_on_over_several_pages(hub, api):
    hub.page = 3
    files = {f"data/part-{number}.parquet": b"%d" % number for number in range(8)} | {"README.md": b"text"}
    hub.commit("me/sounds", files, repo_type="dataset")
    listed = {entry.path: entry for entry in api.list_repo_tree("me/sounds", recursive=True, repo_type="dataset")}
    assert set(listed) == {*files, "data", ".gitattributes"}
    assert listed["data/part-7.parquet"].lfs.sha256 == hashlib.sha256(b"7").hexdigest()
    assert listed["README.md"].lfs is None and listed["README.md"].size == 4
    assert len(requests(hub, "GET", "/tree/")) == 4
    top = [entry.path for entry in api.list_repo_tree("me/sounds", repo_type="dataset")]
    assert top == [".gitattributes", "README.md", "data"]
    below = api.list_repo_tree("me/sounds", "data", repo_type="dataset", expand=True)
    assert all(entry.last_commit.title == "Add files" for entry in below)
    found = api.get_paths_info("me/sounds", ["data", "README.md", "nothing"], repo_type="dataset")
    assert [entry.path for entry in found] == ["data", "README.md"]
    info = api.dataset_info("me/sounds", files_metadata=True)
    assert sum(file.size for file in info.siblings if file.rfilename.startswith("data/")) == 8


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("bytes=10-19", (206, slice(10, 20))),
        ("bytes=299990-", (206, slice(299_990, None))),
        ("bytes=-5", (206, slice(299_995, None))),
        ("bytes=10-999999", (206, slice(10, None))),
        ("bytes=300000-", (416, slice(0, 0))),
    ],
)
def test_ranges(hub, asked, expected):
    hub.commit("me/model", {"model.safetensors": WEIGHTS})
    url = f"{hub.url}/me/model/resolve/main/model.safetensors"
    answer = httpx.get(url, headers={"Range": asked}, trust_env=False)
    assert (answer.status_code, answer.content) == (expected[0], WEIGHTS[expected[1]])
    whole = httpx.head(url, trust_env=False)
    assert whole.headers["X-Linked-Size"] == whole.headers["Content-Length"] == "300000"
    assert whole.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'


def test_wrong_bytes_are_refused(hub, api):
    api.create_repo("me/model")
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    headers = {"Authorization": f"Bearer {WRITE_TOKEN}"}

    def send(method, path, **content):
        return httpx.request(method, hub.url + path, headers=headers, trust_env=False, **content)

    for content in (WEIGHTS[:-1], WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])):
        assert send("PUT", f"/_lfs/{sha256}/{len(WEIGHTS)}", content=content).status_code == 400
    verify = {"oid": sha256, "size": len(WEIGHTS)}
    assert send("POST", "/api/models/me/model/lfs/verify", json=verify).status_code == 404
    line = {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", **verify}}
    refused = send("POST", "/api/models/me/model/commit/main", content=json.dumps(line))
    assert refused.status_code == 400 and "does not exist" in refused.json()["error"]
    assert hub.files("me/model") == {}


def test_large_files_go_up_in_parts(hub, api, tmp_path):
    hub.part_bytes = 100_001
    api.create_repo("me/model")
    api.upload_file(repo_id="me/model", path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors")
    assert [entry.received for entry in requests(hub, "PUT", "/part/")] == [100_001, 100_001, 99_998]
    assert hub.files("me/model") == {"model.safetensors": WEIGHTS}


def test_who_may_do_what(hub, api, tmp_path):
    reader, stranger, nobody = (HfApi(endpoint=hub.url, token=token) for token in (READ_TOKEN, OTHER_TOKEN, False))
    assert api.whoami()["name"] == "me" and reader.whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()

    api.create_repo("me/secret", private=True)
    api.upload_file(repo_id="me/secret", path_or_fileobj=b"x", path_in_repo="a.txt")
    assert reader.model_info("me/secret").private and api.auth_check("me/secret", write=True) is None
    for outsider in (stranger, nobody):
        with pytest.raises(RepositoryNotFoundError):
            outsider.model_info("me/secret")
        with pytest.raises(RepositoryNotFoundError):
            outsider.hf_hub_download("me/secret", "a.txt", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="You must use a write token"):
        reader.upload_file(repo_id="me/secret", path_or_fileobj=b"y", path_in_repo="a.txt")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden.*namespace"):
        stranger.create_repo("me/other")
    with pytest.raises(HfHubHTTPError) as refused:
        nobody.create_repo("me/other")
    assert refused.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as taken:
        api.create_repo("me/secret")
    assert taken.value.response.status_code == 409
    assert api.create_repo("me/secret", exist_ok=True).repo_id == "me/secret"

    api.update_repo_settings("me/secret", private=False, gated="manual")
    assert nobody.model_info("me/secret").gated == "manual"
    for outsider in (stranger, nobody):
        with pytest.raises(GatedRepoError):
            outsider.hf_hub_download("me/secret", "a.txt", cache_dir=tmp_path)
    api.delete_repo("me/secret")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/secret")


def test_cards_are_validated_and_their_metadata_shown(hub, api):
    data = ModelCardData(license="apache-2.0", pipeline_tag="audio-classification", tags=["audio", "dendrites"])
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# A model\n")
    api.create_repo("me/model")
    api.upload_file(repo_id="me/model", path_or_fileobj=str(card).encode(), path_in_repo="README.md")
    info = api.model_info("me/model")
    assert (info.pipeline_tag, info.tags, info.card_data.license) == (data.pipeline_tag, data.tags, "apache-2.0")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(repo_id="me/model", path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429, "headers": {"Retry-After": "0"}}, {"cut_after": 9}, {"cut_after": 0}]
)
def test_the_client_tries_failed_uploads_again(hub, api, quick, fault):
    api.create_repo("me/model")
    hub.faults.append(Fault("PUT /_lfs/", times=2, **fault))
    api.upload_file(repo_id="me/model", path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors")
    tries = requests(hub, "PUT", "/_lfs/")
    assert [entry.status for entry in tries] == [fault.get("status")] * 2 + [200]
    assert [entry.cut for entry in tries] == ["cut_after" in fault] * 2 + [False]
    assert hub.files("me/model") == {"model.safetensors": WEIGHTS}


@pytest.mark.parametrize(
    ("match", "status", "message"),
    [
        ("/api/repos/create", 402, "Private repository storage limit reached"),
        ("/preupload/", 401, "Invalid credentials in Authorization header"),
        ("/commit/", 403, "Storage limit reached"),
        ("/info/lfs/objects/batch", 500, "Internal Error"),
    ],
)
def test_the_client_raises_what_it_cannot_mend(hub, api, quick, match, status, message):
    hub.faults.append(Fault(match, status=status, message=message, times=float("inf")))
    with pytest.raises(HfHubHTTPError, match=message) as failed:
        api.create_repo("me/model")
        api.upload_file(repo_id="me/model", path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors")
    assert failed.value.response.status_code == status


def test_a_download_cut_in_the_middle_goes_on_where_it_was(hub, quick, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.commit("me/model", {"model.safetensors": WEIGHTS})
    hub.faults.append(Fault("GET /me/model/resolve/", cut_after=200_000))
    path = hf_hub_download("me/model", "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS
    first, second = requests(hub, "GET", "/resolve/")
    assert first.cut and first.sent == 200_000 and (second.status, second.sent) == (206, 100_000)


def test_a_server_that_falls_in_the_middle_of_an_upload_comes_back_with_what_it_had(hub, api, folder, quick):
    api.create_repo("me/model")
    api.upload_file(repo_id="me/model", path_or_fileobj=b"{}", path_in_repo="config.json")
    before = hub.commits("me/model")
    hub.faults.append(Fault(hashlib.sha256(WEIGHTS).hexdigest(), cut_after=100_000, down=True))
    with pytest.raises((HfHubHTTPError, RuntimeError, httpx.TransportError)):
        api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.server is None and hub.commits("me/model") == before

    hub.log.clear()
    hub.start()
    api.upload_folder(repo_id="me/model", folder_path=folder)
    assert hub.files("me/model")["model.safetensors"] == WEIGHTS
    assert len(hub.commits("me/model")) == len(before) + 1


def test_a_killed_process_comes_back_with_what_it_had(tmp_path):
    command = [sys.executable, str(ROOT / "tests/hub/server.py"), "--folder", str(tmp_path / "hub")]
    for attempt in range(2):
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().split()[0].removeprefix("HF_ENDPOINT=")
            api = HfApi(endpoint=url, token=WRITE_TOKEN)
            if attempt == 0:
                api.create_repo("me/model")
                api.upload_file(repo_id="me/model", path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors")
            path = hf_hub_download("me/model", "model.safetensors", endpoint=url, cache_dir=tmp_path / str(attempt))
            with open(path, "rb") as file:
                assert file.read() == WEIGHTS
        finally:
            server.send_signal(signal.SIGKILL)
            server.wait()
            server.stdout.close()
