//! Names to folders, against a small Hub on this machine.

#[allow(dead_code, reason = "other tests use the rest")]
mod fake_hub;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use fake_hub::{FakeHub, Fault, MAIN, checksum, words};
use model::error::Error;
use model::hub::{DownloadEvent, Files, Hub};
use serde_json::json;

const OLD: &str = "2222222222222222222222222222222222222222";
const INDEX: &str = "model.safetensors.index.json";

impl FakeHub {
    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.endpoint.clone(),
            cache: self.folder.path().join("hub"),
            token: None,
            offline: false,
        }
    }

    fn repo_folder(&self) -> PathBuf {
        self.folder.path().join("hub/models--acme--tiny")
    }

    /// The requests for contents since the last call, without those for the first byte only.
    fn downloads(&self) -> Vec<String> {
        let requests = std::mem::take(&mut self.shelf.lock().unwrap().requests);
        let is_download =
            |request: &String| request.contains(" bytes=") && !request.ends_with(" bytes=0-0");
        requests.into_iter().filter(is_download).collect()
    }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + len) as u8).collect()
}

fn index(shards: &[&str]) -> Vec<u8> {
    let map: BTreeMap<String, &str> = shards
        .iter()
        .enumerate()
        .map(|(i, shard)| (format!("t{i}"), *shard))
        .collect();
    json!({ "weight_map": map }).to_string().into_bytes()
}

/// A model in two shards, with files that nobody should download.
fn sharded() -> FakeHub {
    FakeHub::start(&[
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", bytes(300)),
        ("README.md", bytes(50)),
        ("pytorch_model.bin", bytes(5000)),
        ("original/consolidated.safetensors", bytes(5000)),
        (
            INDEX,
            index(&["model-1.safetensors", "model-2.safetensors"]),
        ),
        ("model-1.safetensors", bytes(40_000)),
        ("model-2.safetensors", bytes(70_001)),
    ])
}

fn resolve(hub: &Hub, files: Files) -> Result<PathBuf, Error> {
    hub.resolve("acme/tiny", files, &mut |_| {})
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_folder_is_its_own_answer() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub {
        endpoint: "http://127.0.0.1:1".into(),
        cache: folder.path().into(),
        token: None,
        offline: false,
    };
    let name = folder.path().to_str().unwrap();
    assert_eq!(
        hub.resolve(name, Files::Model, &mut |_| {}).unwrap(),
        folder.path()
    );
    let gone = hub
        .resolve(&format!("{name}/gone"), Files::Model, &mut |_| {})
        .unwrap_err();
    assert_eq!(gone.to_string(), format!("there is no folder {name}/gone"));
    fs::write(folder.path().join("file"), "").unwrap();
    let file = hub
        .resolve(&format!("{name}/file"), Files::Model, &mut |_| {})
        .unwrap_err();
    assert!(matches!(file, Error::NotAModel { .. }));
}

#[test]
fn a_sharded_model_is_downloaded_once_and_whole() {
    let server = sharded();
    let folder = resolve(&server.hub(), Files::Model).unwrap();
    assert_eq!(folder, server.repo_folder().join("snapshots").join(MAIN));
    let wanted = [
        "config.json",
        "model-1.safetensors",
        "model-2.safetensors",
        INDEX,
        "tokenizer.json",
    ];
    assert_eq!(names(&folder), wanted);
    assert_eq!(
        fs::read(folder.join("model-2.safetensors")).unwrap(),
        bytes(70_001)
    );
    assert_eq!(names(&server.repo_folder().join("refs")), ["main"]);
    assert_eq!(
        server.downloads().len(),
        7,
        "five files, two of them redirected"
    );

    let mut events = 0;
    let again = server
        .hub()
        .resolve("acme/tiny", Files::Model, &mut |_| events += 1)
        .unwrap();
    assert_eq!((again, events), (folder, 0));
    assert_eq!(server.downloads(), [""; 0]);
}

#[test]
fn progress_adds_up_to_the_file_sizes_even_when_the_connection_breaks() {
    let server = sharded();
    server.change(|shelf| {
        shelf.faults = vec![
            ("model-1.safetensors".into(), Fault::Cut),
            ("tokenizer.json".into(), Fault::Short),
        ]
    });
    let mut seen: Vec<(String, u64, u64)> = Vec::new();
    let mut finished = Vec::new();
    let report = &mut |event: DownloadEvent<'_>| match event {
        DownloadEvent::Started { file, total_bytes } => {
            seen.push((file.to_string(), total_bytes, 0))
        }
        DownloadEvent::Advanced { bytes } => seen.last_mut().unwrap().2 += bytes,
        DownloadEvent::Finished { file } => finished.push(file.to_string()),
        event => panic!("{event:?}"),
    };
    let folder = server
        .hub()
        .resolve("acme/tiny", Files::Model, report)
        .unwrap();
    assert_eq!(
        finished,
        [
            "tokenizer.json",
            "config.json",
            INDEX,
            "model-1.safetensors",
            "model-2.safetensors"
        ]
    );
    assert_eq!(
        seen.iter()
            .map(|(file, ..)| file.clone())
            .collect::<Vec<_>>(),
        finished
    );
    for (file, total_bytes, advanced_bytes) in seen {
        assert_eq!(advanced_bytes, total_bytes, "{file}");
        assert_eq!(fs::metadata(folder.join(file)).unwrap().len(), total_bytes);
    }
    assert_eq!(
        fs::read(folder.join("model-1.safetensors")).unwrap(),
        bytes(40_000)
    );
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), bytes(300));
    let resumed = format!("/cdn/acme/tiny/resolve/{MAIN}/model-1.safetensors bytes=20000-");
    assert!(
        server.downloads().contains(&resumed),
        "the second try goes on where the first ended"
    );
}

#[test]
fn a_file_that_stays_too_short_is_an_error_and_not_kept() {
    let server = sharded();
    server.change(|shelf| shelf.faults = vec![("config.json".into(), Fault::Short); 9]);
    let error = resolve(&server.hub(), Files::Config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "config.json of acme/tiny came with 1 bytes instead of 2"
    );
    assert_eq!(
        names(&server.repo_folder().join("snapshots").join(MAIN)),
        ["tokenizer.json"]
    );
    assert!(matches!(
        resolve(
            &Hub {
                offline: true,
                ..server.hub()
            },
            Files::Config
        ),
        Err(Error::HubOffline { .. })
    ));
}

#[test]
fn partial_files_from_before_are_resumed_completed_or_dropped() {
    let server = sharded();
    let blobs = server.repo_folder().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    let part = |name: &str, bytes: &[u8]| blobs.join(checksum(name, bytes) + ".part");
    let shard = bytes(40_000);
    fs::write(part("model-1.safetensors", &shard), &shard[..100]).unwrap();
    let shard = bytes(70_001);
    fs::write(part("model-2.safetensors", &shard), &shard).unwrap();
    fs::write(part("tokenizer.json", &bytes(300)), bytes(301)).unwrap();
    let folder = resolve(&server.hub(), Files::Model).unwrap();
    assert_eq!(
        fs::read(folder.join("model-1.safetensors")).unwrap(),
        bytes(40_000)
    );
    assert_eq!(
        fs::read(folder.join("model-2.safetensors")).unwrap(),
        bytes(70_001)
    );
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), bytes(300));
    let downloads = server.downloads();
    assert!(downloads.contains(&format!(
        "/cdn/acme/tiny/resolve/{MAIN}/model-1.safetensors bytes=100-"
    )));
    assert!(
        !downloads
            .iter()
            .any(|request| request.contains("model-2.safetensors"))
    );
}

#[test]
fn a_file_with_another_checksum_is_an_error_and_not_kept() {
    let server = sharded();
    for (file, asked) in [
        ("tokenizer.json", Files::Config),
        ("model-2.safetensors", Files::Model),
    ] {
        server.change(|shelf| shelf.faults = vec![(file.into(), Fault::Damage)]);
        let error = resolve(&server.hub(), asked).unwrap_err();
        assert!(
            matches!(&error, Error::HubChecksum { file: named, .. } if named == file),
            "{error}"
        );
        let snapshot = server.repo_folder().join("snapshots").join(MAIN);
        assert!(!snapshot.join(file).exists());
        assert!(!server.repo_folder().join("refs/main").exists());
    }
    // as a crash can leave it
    let (shard, blobs) = (bytes(70_001), server.repo_folder().join("blobs"));
    let part = blobs.join(checksum("model-2.safetensors", &shard) + ".part");
    fs::write(part, bytes(70_000).repeat(2).split_at(70_001).0).unwrap();
    let error = resolve(&server.hub(), Files::Model).unwrap_err();
    assert!(matches!(error, Error::HubChecksum { .. }), "{error}");
    resolve(&server.hub(), Files::Model).unwrap();
}

#[test]
fn a_damaged_file_in_the_cache_is_replaced() {
    let server = sharded();
    let folder = resolve(&server.hub(), Files::Model).unwrap();
    let shard = fs::canonicalize(folder.join("model-1.safetensors")).unwrap();
    fs::write(&shard, b"half").unwrap();
    fs::remove_file(fs::canonicalize(folder.join("tokenizer.json")).unwrap()).unwrap();
    resolve(&server.hub(), Files::Model).unwrap();
    assert_eq!(
        fs::read(folder.join("model-1.safetensors")).unwrap(),
        bytes(40_000)
    );
    assert_eq!(fs::read(folder.join("tokenizer.json")).unwrap(), bytes(300));
}

#[test]
fn without_weights_only_the_small_files_come() {
    let server = sharded();
    let folder = resolve(&server.hub(), Files::Config).unwrap();
    assert_eq!(names(&folder), ["config.json", "tokenizer.json"]);
    let offline = Hub {
        offline: true,
        ..server.hub()
    };
    assert_eq!(resolve(&offline, Files::Config).unwrap(), folder);
    let error = resolve(&offline, Files::Model).unwrap_err();
    let expected = "acme/tiny is not in the cache (no model.safetensors) and HF_HUB_OFFLINE is set";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn an_adapter_needs_its_two_files() {
    let server = FakeHub::start(&[
        ("adapter_config.json", b"{}".to_vec()),
        ("adapter_model.safetensors", bytes(900)),
        ("adapter_model.bin", bytes(900)),
        ("config.json", b"{}".to_vec()),
    ]);
    let folder = resolve(&server.hub(), Files::Adapter).unwrap();
    assert_eq!(
        names(&folder),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
    server.change(|shelf| shelf.remove("adapter_model.safetensors"));
    let error = resolve(&server.hub(), Files::Adapter).unwrap_err();
    let expected = "acme/tiny has no safetensors weights (adapter_model.safetensors); \
                    it has adapter_model.bin";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_revision_has_its_own_snapshot_and_shares_what_did_not_change() {
    let server = sharded();
    server.change(|shelf| {
        shelf.name("v1", OLD);
        shelf.put(OLD, "config.json", b"{\"old\": 1}".to_vec());
        shelf.put(OLD, "model.safetensors", bytes(123));
        shelf.put(OLD, "tokenizer.json", bytes(300));
    });
    resolve(&server.hub(), Files::Model).unwrap();
    server.downloads();
    let old = server
        .hub()
        .resolve("acme/tiny@v1", Files::Model, &mut |_| {})
        .unwrap();
    assert_eq!(
        names(&old),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    assert_eq!(fs::read(old.join("config.json")).unwrap(), b"{\"old\": 1}");
    assert_eq!(fs::read(old.join("tokenizer.json")).unwrap(), bytes(300));
    assert!(
        !server
            .downloads()
            .iter()
            .any(|request| request.contains("tokenizer.json"))
    );
    assert_eq!(names(&server.repo_folder().join("refs")), ["main", "v1"]);

    let offline = Hub {
        offline: true,
        ..server.hub()
    };
    for name in ["acme/tiny@v1".to_string(), format!("acme/tiny@{OLD}")] {
        assert_eq!(
            offline.resolve(&name, Files::Model, &mut |_| {}).unwrap(),
            old
        );
        assert_eq!(
            server
                .hub()
                .resolve(&name, Files::Model, &mut |_| {})
                .unwrap(),
            old
        );
    }
    let error = server
        .hub()
        .resolve("acme/tiny@v9", Files::Model, &mut |_| {})
        .unwrap_err();
    assert_eq!(error.to_string(), "the Hub has no revision v9 in acme/tiny");
}

#[test]
fn a_private_model_needs_the_token_and_no_message_shows_it() {
    let server = sharded();
    server.change(|shelf| shelf.token = Some("hf_right"));
    let error = resolve(&server.hub(), Files::Model).unwrap_err();
    assert!(
        matches!(
            error,
            Error::HubDenied {
                has_token: false,
                ..
            }
        ),
        "{error}"
    );
    let wrong = Hub {
        token: Some("hf_wrong".into()),
        ..server.hub()
    };
    let error = resolve(&wrong, Files::Model).unwrap_err();
    assert!(
        matches!(
            error,
            Error::HubDenied {
                has_token: true,
                ..
            }
        ),
        "{error}"
    );
    assert!(!format!("{error} {error:?} {wrong:?}").contains("hf_wrong"));
    let right = Hub {
        token: Some("hf_right".into()),
        ..server.hub()
    };
    assert!(resolve(&right, Files::Model).unwrap().is_dir());
}

#[test]
fn a_gated_model_can_be_listed_but_not_had() {
    let server = sharded();
    server.change(|shelf| shelf.gated = true);
    let error = resolve(&server.hub(), Files::Config).unwrap_err();
    let expected = "the Hub refuses access to acme/tiny: it is private, gated, or does not exist, \
                    and there is no token";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn missing_models_and_files_are_named() {
    let server = sharded();
    let error = server
        .hub()
        .resolve("acme/none", Files::Model, &mut |_| {})
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is no folder acme/none, and the Hub has no model acme/none"
    );
    let error = resolve(&server.hub(), Files::Adapter).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the Hub has no adapter_config.json in acme/tiny"
    );
    server.change(|shelf| shelf.remove("model-2.safetensors"));
    let error = resolve(&server.hub(), Files::Model).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the Hub has no model-2.safetensors in acme/tiny"
    );
    server.change(|shelf| shelf.remove(INDEX));
    let error = resolve(&server.hub(), Files::Model).unwrap_err();
    assert_eq!(
        error.to_string(),
        "acme/tiny has no safetensors weights (model.safetensors or model.safetensors.index.json); \
         it has \
         model-1.safetensors, original/consolidated.safetensors, pytorch_model.bin"
    );
}

#[test]
fn offline_asks_nobody() {
    let server = sharded();
    let offline = Hub {
        offline: true,
        ..server.hub()
    };
    let error = resolve(&offline, Files::Model).unwrap_err();
    assert_eq!(
        error.to_string(),
        "acme/tiny is not in the cache (no config.json) and HF_HUB_OFFLINE is set"
    );
    let folder = resolve(&server.hub(), Files::Model).unwrap();
    server.change(|shelf| shelf.requests.clear());
    assert_eq!(resolve(&offline, Files::Model).unwrap(), folder);
    fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    let error = resolve(&offline, Files::Model).unwrap_err();
    assert!(matches!(error, Error::HubOffline { file, .. } if file == "model-2.safetensors"));
    server.change(|shelf| assert_eq!(shelf.requests, [""; 0]));
}

#[test]
fn a_hub_out_of_reach_or_out_of_order_is_replaced_by_the_cache_with_a_word() {
    let server = sharded();
    let unreachable = Hub {
        endpoint: "http://127.0.0.1:1".into(),
        ..server.hub()
    };
    let error = resolve(&unreachable, Files::Model).unwrap_err();
    assert!(
        words(&error)
            .contains("cannot download the list of files of acme/tiny: request error: io:"),
        "{error:?}"
    );
    let folder = resolve(&server.hub(), Files::Model).unwrap();
    server.change(|shelf| shelf.status = Some(503));
    for hub in [unreachable, server.hub()] {
        let mut warned = Vec::new();
        let report = &mut |event: DownloadEvent<'_>| match event {
            DownloadEvent::CacheOnly { id, reason } => warned.push((id.to_string(), words(reason))),
            event => panic!("{event:?}"),
        };
        assert_eq!(
            hub.resolve("acme/tiny", Files::Model, report).unwrap(),
            folder
        );
        assert_eq!((warned.len(), warned[0].0.as_str()), (1, "acme/tiny"));
    }
    server.change(|shelf| shelf.status = Some(200));
    assert_eq!(
        resolve(&server.hub(), Files::Model).unwrap(),
        folder,
        "an answer that is no JSON"
    );
    server.change(|shelf| shelf.status = Some(403));
    assert!(matches!(
        resolve(&server.hub(), Files::Model),
        Err(Error::HubDenied { .. })
    ));
}

#[test]
fn shard_names_and_etags_cannot_leave_the_cache() {
    for shard in [
        "../../../evil.safetensors",
        "/tmp/evil.safetensors",
        "a/../b.safetensors",
        "evil.sh",
        "a\\b.safetensors",
    ] {
        let server = FakeHub::start(&[("config.json", b"{}".to_vec()), (INDEX, index(&[shard]))]);
        let error = resolve(&server.hub(), Files::Model).unwrap_err();
        assert!(
            words(&error).contains(&format!("it lists {shard:?}")),
            "{error}"
        );
        assert!(!server.repo_folder().join("refs/main").exists());
    }
    let server = sharded();
    server.change(|shelf| shelf.etag = Some("../../../evil"));
    let error = resolve(&server.hub(), Files::Model).unwrap_err();
    assert!(words(&error).ends_with("Header ETag is invalid"), "{error}");
    assert_eq!(names(server.folder.path()), [""; 0]);
}

#[test]
fn runs_at_once_do_not_disturb_each_other() {
    let server = sharded();
    let hub = server.hub();
    let folders: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| resolve(&hub, Files::Model).unwrap()))
            .collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    for folder in folders {
        assert_eq!(
            fs::read(folder.join("model-1.safetensors")).unwrap(),
            bytes(40_000)
        );
        assert_eq!(
            fs::read(folder.join("model-2.safetensors")).unwrap(),
            bytes(70_001)
        );
    }
}
