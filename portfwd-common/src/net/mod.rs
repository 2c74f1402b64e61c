//! Bytes, addresses, headers and checksums. Byte order is a type: see [`be`].

pub mod address;
pub mod be;
pub mod checksum;
pub mod compose;
pub mod headers;
pub mod packet;

pub use address::{Address, Family, Ipv4, Ipv6};
pub use be::Be16;
pub use checksum::{Delta, Sum};
pub use packet::PacketBuf;
