//! How ranks on the GPUs of one host exchange through memory that each has mapped of the others: the area that a rank gives for that.
//!
//! An area begins with [`AREA_HEADER_BYTES`]: the number of exchanges so far (u32), the blocks of the exchange at hand that have read that
//! number (u32), whether to give up waiting (u32), and 16 bytes from 16 on by which a mapping is known to be the right one. Then come two
//! halves, for odd and even exchanges, each with a slot for every other rank: slot i is for what rank `(own + 1 + i) % ranks` sends here.
//! A slot holds packets of [`PACKET_BYTES`], of which half is data; `kernels/exchange.cu` tells what the other half is for.

use std::ops::RangeInclusive;

use crate::plan::{Collective, DType, Program, ServiceRole};

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

/// A packet, and the data in it.
pub const PACKET_BYTES: u64 = 16;
/// See [`PACKET_BYTES`].
pub const PACKET_DATA_BYTES: u64 = 8;

/// The sizes of an area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExchangeArea {
    /// Ranks that exchange.
    pub ranks: u64,
    /// Bytes of a slot.
    pub slot_bytes: u64,
}

impl ExchangeArea {
    /// An area for parts of so many bytes that a rank sends to each other one, for each of some exchanges.
    pub fn new<'a>(ranks: u64, exchanges: impl IntoIterator<Item = &'a [u64]>) -> ExchangeArea {
        let slots = exchanges.into_iter().map(|parts| packets(parts).saturating_mul(PACKET_BYTES));
        ExchangeArea {
            ranks,
            slot_bytes: slots.max().unwrap_or(0).div_ceil(AREA_HEADER_BYTES).saturating_mul(AREA_HEADER_BYTES),
        }
    }

    /// An area for the collectives of a program; none where it has none.
    pub fn of(program: &Program) -> Option<ExchangeArea> {
        let bytes = |(dtype, count): &(DType, u64)| count.saturating_mul(dtype.bytes());
        let sizes: Vec<Vec<u64>> =
            collectives(program).map(|collective| collective.parts.iter().map(bytes).collect()).collect();
        let ranks = collectives(program).map(|collective| collective.size).max()?;
        Some(ExchangeArea::new(ranks, sizes.iter().map(Vec::as_slice)))
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        let slots = self.ranks.saturating_sub(1).saturating_mul(2);
        slots.saturating_mul(self.slot_bytes).saturating_add(AREA_HEADER_BYTES)
    }
}

/// Packets from a rank to another, of parts of so many bytes: each part begins a new one.
pub fn packets(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |sum, bytes| sum.saturating_add(bytes.div_ceil(PACKET_DATA_BYTES)))
}

/// What runs a collective in one launch, if such kernels take so many ranks and parts.
pub fn exchange_role(collective: &Collective) -> Option<ServiceRole> {
    let role = ServiceRole::Exchange(collective.size, collective.parts.len() as u64);
    role.is_possible().then_some(role)
}

/// The collectives of a program.
pub fn collectives(program: &Program) -> impl Iterator<Item = &Collective> {
    program.buckets.iter().flat_map(|bucket| &bucket.steps).filter_map(|step| step.collective.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::CollectiveKind;

    #[test]
    fn an_area_holds_two_of_the_largest_exchanges_of_each_other_rank() {
        // 3 + 1 + 1 packets, 4 packets: each part begins a packet.
        let area = ExchangeArea::new(3, [&[20, 8, 2][..], &[32]]);
        assert_eq!((packets(&[20, 8, 2]), packets(&[]), packets(&[0])), (5, 0, 0));
        assert_eq!(area, ExchangeArea { ranks: 3, slot_bytes: 256 });
        assert_eq!(area.bytes(), 256 + 2 * 2 * 256);
        let larger = ExchangeArea::new(2, [&[2 << 20][..]]);
        assert_eq!(larger.bytes(), 256 + 2 * (4 << 20));
        assert_eq!(ExchangeArea::new(2, []).bytes(), 256);
        assert!(ExchangeArea::new(8, [&[u64::MAX][..]]).bytes() > 1 << 60, "what cannot be allocated stays large");
    }

    #[test]
    fn kernels_take_so_many_ranks_and_parts() {
        let of =
            |size, parts| Collective { kind: CollectiveKind::AllGather, size, parts: vec![(DType::F32, 1); parts] };
        assert_eq!(exchange_role(&of(2, 3)), Some(ServiceRole::Exchange(2, 3)));
        assert_eq!(exchange_role(&of(8, 4)), Some(ServiceRole::Exchange(8, 4)));
        assert!([of(9, 1), of(1, 1), of(2, 0), of(2, 5)].iter().all(|collective| exchange_role(collective).is_none()));
        for (ranks, parts) in EXCHANGE_RANKS.flat_map(|ranks| EXCHANGE_PARTS.map(move |parts| (ranks, parts))) {
            assert!(ServiceRole::Exchange(ranks, parts).params().len() <= 32, "{ranks} {parts}");
        }
        assert!(!ServiceRole::Exchange(u64::MAX, 1).is_possible() && ServiceRole::Pack.is_possible());
    }
}
