"""Whether the Hub of the tests is one to huggingface_hub, too: that client pushes and pulls with it, and
each of it and `trainer` pulls what the other has pushed.

    cargo build --workspace --examples
    target/debug/examples/local_hub 8080 &
    pip install huggingface_hub==2.4.0
    HF_ENDPOINT=http://127.0.0.1:8080 HF_TOKEN=any HF_HUB_DISABLE_XET=1 \
        python model/tests/fake_hub/check.py target/debug/trainer RUN

RUN is the folder of any run with an adapter. The server must be a new one.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, create_branch, create_repo, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

trainer, run = sys.argv[1:]
home = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = home.name
api = HfApi()


def files(folder):
    every = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in every}


def pulled(repo, **how):
    return snapshot_download(repo, cache_dir=tempfile.mkdtemp(dir=home.name), **how)


def ours(*words):
    done = subprocess.run([trainer, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# huggingface_hub with itself
create_repo("acme/theirs", private=True)
create_repo("acme/theirs", exist_ok=True)
adapter = Path(run) / "adapter"
commit = api.upload_folder(repo_id="acme/theirs", folder_path=adapter)
again = api.upload_folder(repo_id="acme/theirs", folder_path=adapter)
assert again.oid == commit.oid, "nothing to commit"
wanted = files(adapter)
got = files(pulled("acme/theirs"))
assert {name: got[name] for name in wanted} == wanted
assert {entry.path for entry in api.list_repo_tree("acme/theirs")} == got.keys()
create_branch("acme/theirs", branch="v1/b")
hf_hub_download("acme/theirs", "adapter_config.json", revision="v1/b", cache_dir=home.name)
for error, ask in [
    (RepositoryNotFoundError, lambda: api.model_info("acme/none")),
    (RepositoryNotFoundError, lambda: api.model_info("acme/theirs", token=False)),
    (RevisionNotFoundError, lambda: api.model_info("acme/theirs", revision="v9")),
    (HfHubHTTPError, lambda: create_repo("acme/theirs")),
]:
    try:
        ask()
    except error:
        continue
    raise SystemExit(f"no {error.__name__}")

# each with the other
got = files(ours("pull", "acme/theirs"))
assert {name: got[name] for name in wanted} == wanted
page = ours("push", run, "--repo", "acme/ours", "--base-model", "acme/base")
assert page.endswith("/acme/ours")
got = files(pulled("acme/ours"))
edited = {"README.md", "adapter_config.json"}
assert got.keys() - {".gitattributes"} == wanted.keys() | edited
assert all(got[name] == wanted[name] for name in wanted.keys() - edited)
same = api.upload_folder(repo_id="acme/ours", folder_path=adapter, ignore_patterns=list(edited))
assert same.oid == api.model_info("acme/ours").sha, "it has all of it"
print("both clients agree")
