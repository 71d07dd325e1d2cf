//! How ranks on the GPUs of one host exchange through memory that each has mapped of the others: the area that a rank gives for that.
//!
//! An area begins with [`AREA_HEADER_BYTES`]: the number of exchanges so far (u32), the blocks of the exchange at hand that have read that
//! number (u32), whether to give up waiting (u32), and 16 bytes from 16 on by which a mapping is known to be the right one. The rest are two
//! halves of three things each, for odd and even exchanges, with a slot for every other rank: slot i is for what rank `(own + 1 + i) % ranks`
//! sends here. First come slots of [`EXCHANGE_BLOCKS`] flags (u32), in both halves; then slots of packets, again in both halves, for small
//! exchanges, of which half a packet is data; last the same for wide ones, which are data alone. `kernels/exchange.cu` tells the rest.

use std::ops::RangeInclusive;

use crate::plan::{Collective, CollectiveKind, DType, Program, ServiceRole};

/// Ranks that exchange like this: what a host has GPUs.
pub const EXCHANGE_RANKS: RangeInclusive<u64> = 2..=8;

/// Parts of an exchange.
pub const EXCHANGE_PARTS: RangeInclusive<u64> = 1..=4;

/// What stands before an area's slots; all zeros at first, but for the bytes that tell what it is.
pub const AREA_HEADER_BYTES: u64 = 256;

/// Where a header has the number by which waiting is given up, and the bytes that tell what the area is.
pub const AREA_STOP: u64 = 8;
/// See [`AREA_STOP`].
pub const AREA_NAME: u64 = 16;

/// A packet.
pub const PACKET_BYTES: u64 = 16;

/// Blocks of an exchange, at the most; all wide ones have as many.
pub const EXCHANGE_BLOCKS: u64 = 256;

/// An exchange in which a rank sends more to each other one is a wide one: where twice the bytes take longer than a second way over the link,
/// some 2 us at the 400 GB/s of NVLink on Hopper.
const WIDE_FROM_BYTES: u64 = 768 << 10;

/// How an exchange is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExchangeWay {
    /// Whether packets are all data.
    pub wide: bool,
    /// Packets from a rank to another: each part begins a new one.
    pub packets: u64,
}

impl ExchangeWay {
    /// Of parts of so many bytes that a rank sends to each other one.
    pub fn of(parts: &[u64]) -> ExchangeWay {
        let wide = parts.iter().fold(0, |sum: u64, bytes| sum.saturating_add(*bytes)) > WIDE_FROM_BYTES;
        let data = if wide { PACKET_BYTES } else { PACKET_BYTES / 2 };
        ExchangeWay { wide, packets: parts.iter().fold(0, |sum, bytes| sum.saturating_add(bytes.div_ceil(data))) }
    }

    /// Bytes that it takes of a slot.
    pub fn slot_bytes(&self) -> u64 {
        self.packets.saturating_mul(PACKET_BYTES).div_ceil(AREA_HEADER_BYTES).saturating_mul(AREA_HEADER_BYTES)
    }
}

/// The sizes of an area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExchangeArea {
    /// Ranks that exchange.
    pub ranks: u64,
    /// Bytes of a slot for small exchanges, and of one for wide ones.
    pub slot_bytes: [u64; 2],
}

impl ExchangeArea {
    /// An area for parts of so many bytes that a rank sends to each other one, for each of some exchanges.
    pub fn new<'a>(ranks: u64, exchanges: impl IntoIterator<Item = &'a [u64]>) -> ExchangeArea {
        let mut slot_bytes = [0; 2];
        for way in exchanges.into_iter().map(ExchangeWay::of) {
            let slot: &mut u64 = &mut slot_bytes[usize::from(way.wide)];
            *slot = way.slot_bytes().max(*slot);
        }
        ExchangeArea { ranks, slot_bytes }
    }

    /// An area for a program's collectives of so many ranks; none where it has none.
    pub fn of(program: &Program, ranks: u64) -> Option<ExchangeArea> {
        let bytes = |(dtype, count): &(DType, u64)| count.saturating_mul(dtype.bytes());
        let sizes: Vec<Vec<u64>> =
            exchanges_of(program, ranks).map(|collective| collective.parts.iter().map(bytes).collect()).collect();
        (!sizes.is_empty()).then(|| ExchangeArea::new(ranks, sizes.iter().map(Vec::as_slice)))
    }

    /// Slots of both halves.
    fn slots(&self) -> u64 {
        self.ranks.saturating_sub(1).saturating_mul(2)
    }

    /// Where slots for small exchanges begin, and those for wide ones.
    pub fn starts(&self) -> [u64; 2] {
        let small = self.slots().saturating_mul(EXCHANGE_BLOCKS * 4).saturating_add(AREA_HEADER_BYTES);
        [small, self.slots().saturating_mul(self.slot_bytes[0]).saturating_add(small)]
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.slots().saturating_mul(self.slot_bytes[1]).saturating_add(self.starts()[1])
    }
}

/// What runs a collective in one launch, if such kernels take so many ranks and parts. Halves may be used again because every rank hears
/// of every other in each exchange, so sends between two are no such.
pub fn exchange_role(collective: &Collective) -> Option<ServiceRole> {
    let of_all = matches!(collective.kind, CollectiveKind::AllGather | CollectiveKind::AllToAll);
    let role = ServiceRole::Exchange(collective.size, collective.parts.len() as u64);
    (of_all && role.is_possible()).then_some(role)
}

/// The collectives of a program.
pub fn collectives(program: &Program) -> impl Iterator<Item = &Collective> {
    program.buckets.iter().flat_map(|bucket| &bucket.steps).filter_map(|step| step.collective.as_ref())
}

/// Those of so many ranks.
pub fn exchanges_of(program: &Program, ranks: u64) -> impl Iterator<Item = &Collective> {
    collectives(program).filter(move |collective| collective.size == ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_holds_two_of_the_largest_exchanges_of_each_other_rank() {
        // 3 + 1 + 1 packets, 4 packets: each part begins a packet.
        let way = |parts: &[u64]| {
            let ExchangeWay { wide, packets } = ExchangeWay::of(parts);
            (wide, packets)
        };
        assert_eq!([way(&[20, 8, 2]), way(&[]), way(&[0])], [(false, 5), (false, 0), (false, 0)]);
        let area = ExchangeArea::new(3, [&[20, 8, 2][..], &[32]]);
        assert_eq!(area, ExchangeArea { ranks: 3, slot_bytes: [256, 0] });
        assert_eq!((area.starts(), area.bytes()), ([256 + 4 * 1024, 256 + 4 * 1280], 256 + 4 * 1280));
        // Two MiB, 17 bytes and 16: packets are all data.
        assert_eq!(way(&[2 << 20, 17, 16]), (true, (2 << 16) + 3));
        assert_eq!((way(&[WIDE_FROM_BYTES]).0, way(&[WIDE_FROM_BYTES, 1]).0), (false, true));
        let both = ExchangeArea::new(2, [&[2 << 20][..], &[512]]);
        assert_eq!(both, ExchangeArea { ranks: 2, slot_bytes: [1024, 2 << 20] });
        assert_eq!((both.starts(), both.bytes()), ([2304, 2304 + 2048], 2304 + 2048 + (4 << 20)));
        assert!(both.starts().iter().chain(&both.slot_bytes).all(|at| at.is_multiple_of(PACKET_BYTES)));
        assert!(ExchangeArea::new(8, [&[u64::MAX][..]]).bytes() > 1 << 60, "what cannot be allocated stays large");
    }

    #[test]
    fn kernels_take_so_many_ranks_and_parts() {
        let of =
            |size, parts| Collective { kind: CollectiveKind::AllGather, size, parts: vec![(DType::F32, 1); parts] };
        let sent = Collective { kind: CollectiveKind::Send(1), ..of(2, 3) };
        assert_eq!(exchange_role(&sent), None);
        assert_eq!(exchange_role(&of(2, 3)), Some(ServiceRole::Exchange(2, 3)));
        assert_eq!(exchange_role(&of(8, 4)), Some(ServiceRole::Exchange(8, 4)));
        assert!([of(9, 1), of(1, 1), of(2, 0), of(2, 5)].iter().all(|collective| exchange_role(collective).is_none()));
        for (ranks, parts) in EXCHANGE_RANKS.flat_map(|ranks| EXCHANGE_PARTS.map(move |parts| (ranks, parts))) {
            assert!(ServiceRole::Exchange(ranks, parts).params().len() <= 32, "{ranks} {parts}");
        }
        assert!(!ServiceRole::Exchange(u64::MAX, 1).is_possible() && ServiceRole::Pack.is_possible());
    }
}
