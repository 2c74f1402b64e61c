//! The control socket under abuse: many clients, slow ones, broken ones. The daemon goes on serving the others, within a bounded
//! amount of memory.

mod clients;
mod garbage;
mod scene;
mod sizes;
