//! The Hub of the tests by itself: `cargo run --example local_hub -- 8080`, then
//! `HF_ENDPOINT=http://127.0.0.1:8080` and any `HF_TOKEN` for those who are to use it. What is pushed
//! lives as long as the server.

#[allow(dead_code, reason = "tests use the rest")]
#[path = "../tests/fake_hub/mod.rs"]
mod fake_hub;

fn main() {
    let port = std::env::args().nth(1).unwrap_or_default();
    let hub = fake_hub::FakeHub::listen(port.parse().unwrap_or(0));
    println!("{}", hub.endpoint);
    loop {
        std::thread::park();
    }
}
