//! Who is at the other end of the control socket: root and members of the group `portfwd` may talk,
//! nobody else.

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::{Gid, Group},
};

use crate::failure::{Failure, Kind};

/// The group whose members may control the gateway.
pub const GROUP: &str = "portfwd";

/// A peer's user and groups, as they were when it connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    uid: u32,
    /// The primary group and the supplementary ones.
    groups: Vec<u32>,
}

/// Id of the group [`GROUP`]; `None` if this machine has none.
pub fn group_id() -> Result<Option<Gid>> {
    let group = Group::from_name(GROUP).with_context(|| format!("look up group {GROUP}"))?;
    Ok(group.map(|group| group.gid))
}

impl Peer {
    /// The peer of a connected socket.
    pub fn of(socket: BorrowedFd<'_>) -> Result<Self> {
        let credentials =
            getsockopt(&socket, PeerCredentials).context("read the caller's credentials")?;
        let mut groups = supplementary_groups(socket)?;
        groups.push(credentials.gid());
        Ok(Self {
            uid: credentials.uid(),
            groups,
        })
    }

    /// Whether it may control the gateway. The mode of the socket says the same; this holds for
    /// descriptors that were passed on and for a socket whose mode was changed.
    pub fn check(&self, group: Option<Gid>) -> Result<(), Failure> {
        if self.uid == 0 || group.is_some_and(|group| self.groups.contains(&group.as_raw())) {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Permission,
            format!("user {} may not control portfwd", self.uid),
        )
        .hint(format!("be root, or join the group {GROUP}")))
    }
}

fn supplementary_groups(socket: BorrowedFd<'_>) -> Result<Vec<u32>> {
    // The kernel says how many there are if the buffer is too small for them.
    let mut groups = vec![0_u32; 64];
    loop {
        let mut length = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the buffer is `length` bytes long and lives through the call; the kernel writes
        // at most that, and its length.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let needed = length as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || needed <= groups.len() {
            return Err(error).context("read the caller's groups");
        }
        groups.resize(needed, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn root_and_the_group_may_and_others_may_not() {
        let group = Some(Gid::from_raw(990));
        for (uid, groups, group, expected) in [
            (0, vec![0], group, true),
            (0, vec![0], None, true),
            (1000, vec![1000, 990], group, true),
            (1000, vec![990], group, true),
            (1000, vec![1000, 0], group, false),
            (1000, vec![1000, 990], None, false),
        ] {
            let peer = Peer { uid, groups };
            assert_eq!(peer.check(group).is_ok(), expected, "{peer:?} {group:?}");
        }
    }

    #[test]
    fn a_peer_is_the_process_at_the_other_end() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Peer::of(one.as_fd()).unwrap();
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.groups.contains(&nix::unistd::getegid().as_raw()));
        for group in nix::unistd::getgroups().unwrap() {
            assert!(peer.groups.contains(&group.as_raw()));
        }
    }
}
