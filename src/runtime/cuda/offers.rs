//! What ranks tell each other before they exchange through memory: whether each can, and by what the others find its area.

use anyhow::{Context, Error, Result, bail};
use serde::{Deserialize, Serialize};

use super::collective::Road;
use crate::plan::ExchangeArea;
use crate::runtime::group::{Group, short, tell};

/// The area that a rank gives, or why it gives none.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Why there is none.
    pub(super) fault: Option<String>,
    /// The host, as no other host is called.
    pub(super) host: String,
    /// What the area's header says, and no other area's.
    pub(super) name: Vec<u8>,
    /// By which it is mapped.
    pub(super) handle: Vec<u8>,
    /// As [`ExchangeArea::ranks`].
    pub(super) ranks: u64,
    /// As [`ExchangeArea::slot_bytes`].
    pub(super) slot_bytes: [u64; 2],
}

impl Offer {
    /// None, for a reason.
    pub(super) fn none(error: &Error) -> Offer {
        Offer { fault: Some(short(error)), ..Offer::default() }
    }

    /// Its sizes.
    pub(super) fn area(&self) -> ExchangeArea {
        ExchangeArea { ranks: self.ranks, slot_bytes: self.slot_bytes }
    }

    /// Why nobody can take it, beside the first rank's.
    fn refusal(&self, first: &Offer) -> Option<String> {
        match &self.fault {
            Some(fault) => Some(fault.clone()),
            None if self.host != first.host => Some("it is on another host than the first".into()),
            None if self.area() != first.area() => {
                Some(format!("expected {:?}, as the first, found {:?}", first.area(), self.area()))
            }
            None => None,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Told {
    road: Road,
    offer: Offer,
}

/// The offers of all ranks of a group, if each can be taken; else why not, the same on all ranks. All ranks call it.
///
/// # Errors
/// A rank is no more, or was told to exchange in another way.
pub(super) fn agree(group: &mut dyn Group, road: Road, offer: Offer) -> Result<Result<Vec<Offer>, String>> {
    let told = tell(group, &Told { road, offer })?;
    let first = told.first().context("a group of no ranks")?;
    if let Some(rank) = told.iter().position(|told| told.road != first.road) {
        bail!(
            "--exchange: expected {:?} on rank {rank} of the group, as on its first, found {:?}; give all ranks the same options",
            first.road,
            told[rank].road
        );
    }
    let refused = told.iter().enumerate().find_map(|(rank, told)| Some((rank, told.offer.refusal(&first.offer)?)));
    Ok(match refused {
        Some((rank, why)) => Err(of_rank(rank, &why)),
        None => Ok(told.into_iter().map(|told| told.offer).collect()),
    })
}

/// Why something that all ranks of a group have tried is not done on all of them, the same on all ranks; none if it is. All ranks call
/// it.
///
/// # Errors
/// A rank is no more.
pub(super) fn missing<T>(group: &mut dyn Group, own: &Result<T>) -> Result<Option<String>> {
    let faults = tell(group, &own.as_ref().err().map(short))?;
    Ok(faults.into_iter().enumerate().find_map(|(rank, fault)| Some(of_rank(rank, &fault?))))
}

fn of_rank(rank: usize, why: &str) -> String {
    format!("rank {rank} of the group: {why}")
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::runtime::group::{FAULT_CHARS, LocalGroup};

    fn on_ranks<R: Send>(size: usize, run: impl Fn(LocalGroup) -> R + Sync) -> Vec<R> {
        std::thread::scope(|scope| {
            let run = &run;
            let ranks: Vec<_> =
                LocalGroup::new(size).into_iter().map(|group| scope.spawn(move || run(group))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
        })
    }

    fn offer(rank: usize) -> Offer {
        let (name, handle) = (vec![rank as u8; 16], vec![255 - rank as u8; 64]);
        Offer { fault: None, host: "a".into(), name, handle, ranks: 3, slot_bytes: [1 << 20, u64::MAX] }
    }

    /// What three ranks agree on, where the offer of rank 2 is another.
    fn agreed(change: impl Fn(&mut Offer) + Sync) -> Result<Vec<Offer>, String> {
        let all = on_ranks(3, |mut group| {
            let mut own = offer(group.rank());
            if group.rank() == 2 {
                change(&mut own);
            }
            agree(&mut group, Road::Auto, own).expect("all are there")
        });
        assert!(all.iter().all(|found| *found == all[0]), "{all:?}");
        all[0].clone()
    }

    #[test]
    fn all_ranks_take_all_offers_or_none() {
        assert_eq!(agreed(|_| ()), Ok((0..3).map(offer).collect()));
        let refused = |change: fn(&mut Offer)| agreed(change).expect_err("one cannot be taken");
        assert_eq!(refused(|own| own.host = "b".into()), "rank 2 of the group: it is on another host than the first");
        let sizes = refused(|own| own.slot_bytes[0] = 7);
        assert!(sizes.starts_with("rank 2 of the group: expected ExchangeArea") && sizes.contains("found"), "{sizes}");
        // As long as what is told may be, whatever it says.
        let long = refused(|own| *own = Offer::none(&anyhow!("{}", "\u{1}é\"".repeat(1000))));
        assert_eq!(long.chars().count(), "rank 2 of the group: ".len() + FAULT_CHARS);
    }

    #[test]
    fn other_options_on_a_rank_are_told() {
        let told = on_ranks(2, |mut group| {
            let road = [Road::Auto, Road::Nccl][group.rank()];
            let own = offer(group.rank());
            agree(&mut group, road, own).expect_err("they differ").to_string()
        });
        assert!(told[0] == told[1] && told[0].contains("expected Auto on rank 1 of the group"), "{told:?}");
    }

    #[test]
    fn what_failed_on_one_rank_is_known_to_all() {
        let found = on_ranks(3, |mut group| {
            let own = if group.rank() == 1 { Err(anyhow!("no such memory").context("mapping")) } else { Ok(()) };
            let failed = missing(&mut group, &own).expect("all are there");
            (failed, missing(&mut group, &Ok(())).expect("all are there"))
        });
        let why = Some("rank 1 of the group: mapping: no such memory".to_owned());
        assert!(found.iter().all(|(failed, then)| *failed == why && then.is_none()), "{found:?}");
    }
}
