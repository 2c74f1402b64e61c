//! In how many buffers XDP may find a frame: jumbo frames do not fit into one.
//!
//! The kernel gives a program frames in several buffers if it was loaded as one that knows of them (`BPF_F_XDP_HAS_FRAGS`), and a
//! driver with a large MTU takes no other. But for such a program generic XDP copies a packet into buffers of its own
//! (`skb_pp_cow_data`, since kernel 6.9), and the copy has lost the length of its link header: TC, which takes what XDP passes,
//! finds the IP header in the place of the link header (seen with 6.18). Where generic XDP is wanted the programs know of
//! one buffer, and the kernel brings every packet into one.

use std::borrow::Cow;

/// What XDP programs know of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Frames {
    /// Frames in several buffers.
    #[default]
    Scattered,
    /// Frames in one.
    Whole,
}

/// Name of the section whose programs know of several buffers, and of one whose programs do not.
const SCATTERED: &[u8] = b"xdp.frags\0";
const WHOLE: &[u8] = b"xdp\0frags\0";

impl Frames {
    /// An object of programs that know of several buffers, for such programs.
    pub fn object(self, scattered: &[u8]) -> Cow<'_, [u8]> {
        match self {
            Self::Scattered => Cow::Borrowed(scattered),
            Self::Whole => Cow::Owned(renamed(scattered)),
        }
    }
}

/// An object whose sections have the other name: a name ends with the first zero.
fn renamed(object: &[u8]) -> Vec<u8> {
    let mut object = object.to_vec();
    let places: Vec<_> = object
        .windows(SCATTERED.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == SCATTERED)
        .map(|(place, _)| place)
        .collect();
    for place in places {
        object[place..place + WHOLE.len()].copy_from_slice(WHOLE);
    }
    object
}

#[cfg(test)]
mod tests {
    use aya_obj::{Object, ProgramSection};

    use super::*;
    use crate::bpf::OBJECT;

    #[test]
    fn the_same_programs_know_of_several_buffers_or_of_one() {
        for (frames, expected) in [(Frames::Scattered, true), (Frames::Whole, false)] {
            let object = Object::parse(&frames.object(OBJECT)).unwrap();
            let sections = object.programs.values().map(|program| &program.section);
            let xdp: Vec<_> = sections
                .filter_map(|section| {
                    if let ProgramSection::Xdp { frags, .. } = section {
                        Some(*frags)
                    } else {
                        None
                    }
                })
                .collect();
            assert_eq!(xdp, [expected; 4], "{frames:?}");
        }
    }
}
