//! Files to a small Hub on this machine.

#[allow(dead_code, reason = "other tests use the rest")]
mod fake_hub;

use std::fs;

use fake_hub::{FakeHub, Fault, checksum};
use model::error::{Error, PushFailure, Result};
use model::hub::{Content, Files, Hub, Push, PushFile, Pushed, UploadEvent};

const TOKEN: &str = "hf_secret";
const WEIGHTS: &str = "adapter_model.safetensors";

fn hub(server: &FakeHub) -> Hub {
    Hub {
        endpoint: server.endpoint.clone(),
        cache: server.folder.path().join("hub"),
        token: Some(TOKEN.into()),
        offline: false,
    }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + len) as u8).collect()
}

fn file(name: &str, content: Vec<u8>) -> PushFile {
    PushFile {
        name: name.into(),
        content: Content::Bytes(content),
    }
}

/// An adapter whose weights lie on the disk.
fn adapter(server: &FakeHub, weights: usize) -> Vec<PushFile> {
    let path = server.folder.path().join(WEIGHTS);
    fs::write(&path, bytes(weights)).unwrap();
    vec![
        file("README.md", b"---\nbase_model: owner/base\n---\n".to_vec()),
        file("adapter_config.json", b"{}".to_vec()),
        PushFile {
            name: WEIGHTS.into(),
            content: Content::File(path),
        },
    ]
}

fn push<'a>(files: Vec<PushFile>) -> Push<'a> {
    Push {
        repo: "acme/mine",
        revision: None,
        private: false,
        summary: "An adapter",
        files,
    }
}

fn send(hub: &Hub, push: &Push<'_>) -> Result<Pushed> {
    hub.push(push, &mut |_| {})
}

/// What a user reads of an error, which must not have the token in it.
fn words(error: &Error) -> String {
    let text = fake_hub::words(error);
    assert!(!format!("{text} {error:?}").contains(TOKEN), "{error:?}");
    text
}

/// How many contents came to the storage.
fn puts(server: &FakeHub) -> usize {
    let shelf = server.shelf.lock().unwrap();
    let is_put = |request: &&String| request.starts_with("PUT /storage/");
    shelf.requests.iter().filter(is_put).count()
}

#[test]
fn a_push_makes_the_repository_and_what_it_holds_can_be_pulled() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let push = push(adapter(&server, 50_000));
    let mut events = Vec::new();
    let report = &mut |event: UploadEvent<'_>| events.push(format!("{event:?}"));
    let pushed = hub.push(&push, report).unwrap();
    assert_eq!(pushed.url, format!("{}/acme/mine", server.endpoint));
    assert!(pushed.created);
    assert_eq!(pushed.sent, ["README.md", "adapter_config.json", WEIGHTS]);
    let said = ["Created", "Hashing", "Started", "Advanced", "Finished"];
    for word in said {
        assert!(events.iter().any(|event| event.starts_with(word)), "{word}");
    }

    let (kind, folder) = hub.pull("acme/mine", &mut |_| {}).unwrap();
    assert_eq!(kind, Files::Adapter);
    assert!(folder.ends_with(&pushed.commit));
    for name in ["README.md", "adapter_config.json", ".gitattributes"] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), bytes(50_000));
    let offline = Hub {
        offline: true,
        ..hub
    };
    let again = offline.pull("acme/mine", &mut |_| {}).unwrap();
    assert_eq!(again, (Files::Adapter, folder));
}

#[test]
fn what_the_hub_has_is_not_sent_again() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let mut push = push(adapter(&server, 5000));
    let first = send(&hub, &push).unwrap();
    let again = send(&hub, &push).unwrap();
    let names = ["README.md", "adapter_config.json", WEIGHTS];
    assert_eq!(again.unchanged, names);
    assert_eq!((again.sent.len(), again.created), (0, false));
    assert_eq!(again.commit, first.commit, "no empty commit");

    // the same weights under another name, and another small file
    push.files[1] = file("adapter_config.json", b"{ }".to_vec());
    push.files[2].name = "model.safetensors".into();
    let third = send(&hub, &push).unwrap();
    assert_eq!(third.sent, ["adapter_config.json"]);
    assert_eq!(third.stored, ["model.safetensors"]);
    assert_eq!(puts(&server), 1);
}

#[test]
fn a_push_that_was_cut_off_goes_on_where_it_ended() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let files = ["model-1.safetensors", "model-2.safetensors"];
    let all = [bytes(3000), bytes(4000)];
    let push = push(vec![
        file(files[0], all[0].clone()),
        file(files[1], all[1].clone()),
    ]);
    let second = checksum(files[1], &all[1]);
    server.change(|shelf| shelf.faults = vec![(second, Fault::Refuse)]);
    let error = words(&send(&hub, &push).unwrap_err());
    let expected = "cannot push to acme/mine: cannot upload model-2.safetensors: the Hub answers \
                    403: refused";
    assert_eq!(error, expected);
    let nothing = |name| {
        let shelf = server.shelf.lock().unwrap();
        shelf.file("acme/mine", "main", name).is_none()
    };
    assert!(files.into_iter().all(nothing), "all or none");

    let pushed = send(&hub, &push).unwrap();
    assert_eq!(pushed.stored, files[..1]);
    assert_eq!(pushed.sent, files[1..]);
    assert_eq!(puts(&server), 3);
}

#[test]
fn a_broken_connection_is_tried_again_and_progress_only_goes_forward() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let weights = bytes(3_000_000);
    let sum = checksum(WEIGHTS, &weights);
    server.change(|shelf| shelf.faults = vec![(sum, Fault::Cut)]);
    let mut seen = 0;
    let report = &mut |event: UploadEvent<'_>| match event {
        UploadEvent::Advanced { bytes } => seen += bytes,
        UploadEvent::Started { total_bytes, .. } => assert_eq!((total_bytes, seen), (3_000_000, 0)),
        _ => {}
    };
    hub.push(&push(vec![file(WEIGHTS, weights.clone())]), report)
        .unwrap();
    assert_eq!(seen, 3_000_000);
    assert_eq!(puts(&server), 2);
    let shelf = server.shelf.lock().unwrap();
    assert_eq!(shelf.file("acme/mine", "main", WEIGHTS), Some(&weights[..]));
}

#[test]
fn a_large_file_goes_in_parts_where_the_hub_asks_for_them() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    server.change(|shelf| shelf.part_bytes = Some(400));
    let push = push(adapter(&server, 4100));
    let mut seen = 0;
    let report = &mut |event: UploadEvent<'_>| {
        if let UploadEvent::Advanced { bytes } = event {
            seen += bytes;
        }
    };
    hub.push(&push, report).unwrap();
    assert_eq!((seen, puts(&server)), (4100, 11));
    let shelf = server.shelf.lock().unwrap();
    let there = shelf.file("acme/mine", "main", WEIGHTS);
    assert_eq!(there, Some(&bytes(4100)[..]));
}

#[test]
fn a_branch_is_made_and_main_stays_as_it_is() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    send(&hub, &push(vec![file("config.json", b"{}".to_vec())])).unwrap();
    let on_branch = Push {
        revision: Some("runs/v2"),
        ..push(vec![file("config.json", b"{ }".to_vec())])
    };
    let pushed = send(&hub, &on_branch).unwrap();
    assert!(pushed.url.ends_with("/acme/mine/tree/runs/v2"));
    assert_eq!(pushed.sent, ["config.json"]);
    assert_eq!(send(&hub, &on_branch).unwrap().unchanged, ["config.json"]);
    let shelf = server.shelf.lock().unwrap();
    let on = |branch| shelf.file("acme/mine", branch, "config.json").unwrap();
    assert_eq!((on("main"), on("runs/v2")), (&b"{}"[..], &b"{ }"[..]));
}

#[test]
fn weights_of_before_that_would_still_be_read_are_removed() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let one = [
        file("model.safetensors", bytes(100)),
        file("notes.safetensors", bytes(9)),
    ];
    send(&hub, &push(one.to_vec())).unwrap();
    let shards = vec![
        file("model-1.safetensors", bytes(60)),
        file("model.safetensors.index.json", b"{}".to_vec()),
    ];
    let pushed = send(&hub, &push(shards)).unwrap();
    assert_eq!(pushed.removed, ["model.safetensors"]);
    let shelf = server.shelf.lock().unwrap();
    assert_eq!(shelf.file("acme/mine", "main", "model.safetensors"), None);
    let other = shelf.file("acme/mine", "main", "notes.safetensors");
    assert!(other.is_some(), "only what we know");
}

#[test]
fn a_private_repository_is_private_from_the_first_moment() {
    let server = FakeHub::listen(0);
    let hub = hub(&server);
    let private = Push {
        private: true,
        ..push(vec![file("config.json", b"{}".to_vec())])
    };
    send(&hub, &private).unwrap();
    assert!(server.shelf.lock().unwrap().repos["acme/mine"].private);
    send(&hub, &private).unwrap();
    server.change(|shelf| shelf.repos.get_mut("acme/mine").unwrap().private = false);
    let error = send(&hub, &private).unwrap_err();
    assert!(matches!(error, Error::HubPublic { .. }), "{error}");
}

#[test]
fn what_cannot_be_pushed_is_refused_before_anything_is_sent() {
    let server = FakeHub::listen(0);
    let files = || vec![file("config.json", b"{}".to_vec())];
    let offline = Hub {
        offline: true,
        ..hub(&server)
    };
    let error = send(&offline, &push(files())).unwrap_err();
    assert_eq!(
        words(&error),
        "cannot push to acme/mine: HF_HUB_OFFLINE is set"
    );
    let stranger = Hub {
        token: None,
        ..hub(&server)
    };
    let error = send(&stranger, &push(files())).unwrap_err();
    assert!(matches!(error, Error::HubNoToken { .. }), "{error}");
    server.change(|shelf| assert_eq!(shelf.requests, [""; 0]));

    server.change(|shelf| shelf.read_only = true);
    let error = words(&send(&hub(&server), &push(files())).unwrap_err());
    assert!(
        error.contains("cannot create the repository: the Hub answers 403: You don't have"),
        "{error}"
    );
    let card = b"---\nbase_model: /home/me/base\n---\n".to_vec();
    server.change(|shelf| shelf.read_only = false);
    let error = send(&hub(&server), &push(vec![file("README.md", card)])).unwrap_err();
    let said = "cannot commit the files: the Hub answers 400: \"base_model\" with value";
    assert!(words(&error).contains(said), "{error:?}");
}

#[test]
fn a_token_is_not_told_even_if_the_hub_repeats_it() {
    let server = FakeHub::listen(0);
    server.change(|shelf| shelf.token = Some("hf_right"));
    let error = send(&hub(&server), &push(Vec::new())).unwrap_err();
    words(&error); // which looks for it
    assert!(!format!("{:?}", hub(&server)).contains(TOKEN));
    let failure = PushFailure::Refused {
        status: 400,
        said: String::new(),
    };
    assert_eq!(failure.to_string(), "the Hub answers 400");
}

#[test]
fn a_hub_that_is_not_there_is_a_network_error() {
    let server = FakeHub::listen(0);
    let nowhere = Hub {
        endpoint: "http://127.0.0.1:1".into(),
        ..hub(&server)
    };
    let error = send(&nowhere, &push(Vec::new())).unwrap_err();
    let network = matches!(
        &error,
        Error::HubPush {
            source: PushFailure::Network(_),
            ..
        }
    );
    assert!(network, "{error:?}");
}
