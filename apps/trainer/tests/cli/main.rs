//! The built program in a fresh folder: exit code and both streams.

#[allow(dead_code, reason = "the tests of the model crate use the rest")]
#[path = "../../../../model/tests/fake_hub/mod.rs"]
mod fake_hub;
mod support;
#[cfg(unix)]
mod survive;

mod chat;
mod devices;
mod eval;
mod generate;
mod hub;
mod merge;
mod plan;
#[cfg(unix)]
mod pty;
mod push;
mod quantize;
mod report;
#[cfg(unix)]
mod terminal;
mod train;
mod bad_input {
    mod adapters;
    mod data;
    mod merge;
    mod models;
    mod output;
    mod recipes;
    mod usage;
}
