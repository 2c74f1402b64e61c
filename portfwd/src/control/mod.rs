//! The daemon's control interface: HTTP/1.1 and JSON over a unix socket.

mod answers;
pub mod apply;
pub mod client;
mod connections;
pub mod gateway;
pub mod listeners;
pub mod peer;
pub mod protocol;
pub mod server;
pub mod shutdown;
