//! A frame in memory of the host.

use std::cell::Cell;

use bytemuck::{Pod, bytes_of, bytes_of_mut};

use crate::net::{Delta, PacketBuf, packet::SumChange};

/// The bytes of a frame from some offset on.
///
/// It holds the core to what a kernel's packet memory can do: an access that is not aligned within the frame panics.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<'a> {
    frame: &'a [Cell<u8>],
    start: usize,
}

impl<'a> Bytes<'a> {
    /// All of a frame.
    pub const fn new(frame: &'a [Cell<u8>]) -> Self {
        Self { frame, start: 0 }
    }

    /// The cells of a value at an offset, if they are all there.
    fn cells<T: Pod>(self, at: usize) -> Option<&'a [Cell<u8>]> {
        const {
            assert!(
                align_of::<T>() <= 2,
                "headers are 2-aligned within a frame, not more"
            );
        }
        let start = self.start + at;
        assert!(
            start.is_multiple_of(align_of::<T>()),
            "access to a frame at offset {start} is not aligned"
        );
        self.frame.get(start..start + size_of::<T>())
    }
}

impl PacketBuf for Bytes<'_> {
    fn remaining(self) -> u32 {
        self.frame.len().saturating_sub(self.start) as u32
    }

    fn read<T: Pod>(self, at: usize) -> Option<T> {
        let cells = self.cells::<T>(at)?;
        let mut value = T::zeroed();
        for (byte, cell) in bytes_of_mut(&mut value).iter_mut().zip(cells) {
            *byte = cell.get();
        }
        Some(value)
    }

    fn write<T: Pod>(self, at: usize, value: T) -> Option<()> {
        let cells = self.cells::<T>(at)?;
        for (byte, cell) in bytes_of(&value).iter().zip(cells) {
            cell.set(*byte);
        }
        Some(())
    }

    fn after(self, bytes: usize) -> Self {
        Self {
            start: self.start + bytes,
            ..self
        }
    }

    fn update_sum(self, change: SumChange) -> Option<()> {
        change.apply_to_bytes(self)
    }

    fn update_whole_sum(self, _: Delta) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(bytes: &mut [u8]) -> &[Cell<u8>] {
        Cell::from_mut(bytes).as_slice_of_cells()
    }

    #[test]
    fn reads_and_writes_end_where_the_frame_ends() {
        let mut frame = [1, 2, 3, 4, 5];
        let bytes = Bytes::new(cells(&mut frame)).after(2);
        assert_eq!(bytes.remaining(), 3);
        assert_eq!(bytes.read(0), Some([3_u8, 4, 5]));
        assert_eq!(bytes.read::<[u8; 4]>(0), None);
        assert_eq!(bytes.write(0, [9_u8; 4]), None);
        assert_eq!(bytes.write(1, [9_u8; 2]), Some(()));
        assert_eq!(bytes.after(60).remaining(), 0);
        assert_eq!(bytes.after(60).read::<u8>(0), None);
        assert_eq!(frame, [1, 2, 3, 9, 9]);
    }

    #[test]
    #[should_panic(expected = "offset 3 is not aligned")]
    fn a_word_at_an_odd_offset_is_refused() {
        let mut frame = [0; 8];
        let _ = Bytes::new(cells(&mut frame)).after(2).read::<u16>(1);
    }
}
