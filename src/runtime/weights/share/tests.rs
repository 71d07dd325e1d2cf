use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::*;
use crate::runtime::group::LocalGroup;

/// A rank's memory: what lies there, and how many others have mapped it.
#[derive(Default)]
struct Memory {
    weights: Mutex<Option<usize>>,
    mapped: AtomicUsize,
}

/// What goes wrong on a rank of the world.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    Offer(usize),
    Map(usize),
    Read(usize),
    Copy(usize),
}

/// The weights of a rank of the world. A program's are its number.
struct Weights<'m> {
    all: &'m [Arc<Memory>],
    rank: usize,
    program: usize,
    fault: Fault,
    reads: usize,
}

struct Mapped(Arc<Memory>);

impl Drop for Mapped {
    fn drop(&mut self) {
        self.0.mapped.fetch_sub(1, SeqCst);
    }
}

impl Weights<'_> {
    fn place(&self) -> std::sync::MutexGuard<'_, Option<usize>> {
        self.all[self.rank].weights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Region for Weights<'_> {
    type Mapped = Mapped;

    fn offer(&mut self) -> Result<Offer> {
        ensure!(self.fault != Fault::Offer(self.rank), "nothing is shared here");
        Ok(Offer { name: vec![self.program as u8], handle: vec![self.rank as u8], sizes: [3, 0, 2] })
    }

    fn map(&mut self, offer: &Offer) -> Result<Mapped> {
        ensure!(self.fault != Fault::Map(self.rank), "no link");
        assert_eq!((&offer.name[..], offer.sizes), (&[self.program as u8][..], [3, 0, 2]));
        let memory = &self.all[usize::from(offer.handle[0])];
        memory.mapped.fetch_add(1, SeqCst);
        Ok(Mapped(Arc::clone(memory)))
    }

    fn read(&mut self) -> Result<()> {
        ensure!(self.fault != Fault::Read(self.rank), "no such file");
        self.reads += 1;
        // Whoever copies before that finds nothing.
        thread::sleep(std::time::Duration::from_millis(5));
        *self.place() = Some(self.program);
        Ok(())
    }

    fn copy(&mut self, from: Mapped) -> Result<()> {
        ensure!(self.fault != Fault::Copy(self.rank), "the device failed");
        let found = *from.0.weights.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(found.is_some(), "the weights of another rank are copied when they are there");
        *self.place() = found;
        Ok(())
    }
}

type Found = Result<Vec<Loaded>, String>;

/// What each rank of a world finds whose hosts have so many ranks each, of a plan with so many programs.
fn on_hosts(hosts: &[usize], programs: usize, sharing: Sharing, fault: Fault) -> Vec<Found> {
    let all: Vec<Arc<Memory>> = (0..hosts.iter().sum()).map(|_| Arc::default()).collect();
    let groups = hosts.iter().flat_map(|&ranks| LocalGroup::new(ranks));
    thread::scope(|scope| {
        let all = &all;
        let run = |(rank, mut host): (usize, LocalGroup)| {
            scope.spawn(move || {
                let program = rank % programs;
                let mut weights = Weights { all, rank, program, fault, reads: 0 };
                let found = load(&mut host, (rank, program), sharing, &mut weights)
                    .map_err(|error: anyhow::Error| format!("{error:#}"))?;
                assert_eq!(*weights.place(), Some(program), "rank {rank}");
                assert_eq!(all[rank].mapped.load(SeqCst), 0, "rank {rank} may free its memory");
                let own = found.iter().find(|loaded| loaded.rank == rank).ok_or("it has told nothing")?;
                assert_eq!(weights.reads, usize::from(own.from.is_none()), "rank {rank}");
                assert!(own.seconds > 0.0);
                Ok(found)
            })
        };
        let ranks: Vec<_> = groups.enumerate().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
    })
}

/// Whom each rank copies from, as all ranks of its host say.
fn sources(hosts: &[usize], programs: usize, sharing: Sharing, fault: Fault) -> Vec<Option<usize>> {
    let found: Vec<Vec<Loaded>> =
        on_hosts(hosts, programs, sharing, fault).into_iter().map(|found| found.expect("all have weights")).collect();
    let mut sources = vec![];
    for &ranks in hosts {
        let host = &found[sources.len()..][..ranks];
        assert!(host.iter().all(|other| *other == host[0]), "{host:?}");
        assert!(host[0].iter().map(|loaded| loaded.rank).eq(sources.len()..sources.len() + ranks));
        sources.extend(host[0].iter().map(|loaded| loaded.from));
    }
    sources
}

#[test]
fn on_each_host_one_rank_reads_for_those_with_the_same_program() {
    let share = |hosts: &[usize], programs| {
        let found = sources(hosts, programs, Sharing::Share, Fault::None);
        assert_eq!(sources(hosts, programs, Sharing::Auto, Fault::None), found, "without being told to");
        found
    };
    assert_eq!(share(&[1], 1), [None]);
    assert_eq!(share(&[4], 1), [None, Some(0), Some(0), Some(0)]);
    assert_eq!(share(&[2, 2], 1), [None, Some(0), None, Some(2)]);
    assert_eq!(share(&[4], 4), [None; 4]);
    assert_eq!(share(&[4], 2), [None, None, Some(0), Some(1)]);
    // Groups of three, of which the second is on two hosts.
    assert_eq!(share(&[4, 2, 3], 3), [None, None, None, Some(0), None, None, None, None, None]);
    assert_eq!(share(&[2, 4], 2), [None, None, None, None, Some(2), Some(3)]);
}

#[test]
fn every_rank_reads_if_told_to() {
    assert_eq!(sources(&[4, 2], 2, Sharing::Read, Fault::None), [None; 6]);
}

#[test]
fn a_rank_that_cannot_copy_ends_all_of_its_host_if_told_to_share() {
    let refused = |fault| on_hosts(&[3, 2], 1, Sharing::Share, fault);
    for (fault, why) in [
        (Fault::Map(2), "rank 2 does not reach that of rank 0: no link; use --weights read"),
        (Fault::Offer(0), "rank 1 does not reach that of rank 0: nothing is shared here; use --weights read"),
    ] {
        let found = refused(fault);
        let told: Vec<&String> = found[..3].iter().map(|found| found.as_ref().expect_err("it fails")).collect();
        assert!(
            told.iter().all(|text| text.starts_with("--weights share: expected") && text.ends_with(why)),
            "{told:?}"
        );
        assert!(found[3..].iter().all(Result::is_ok), "the other host has nothing to do with it");
    }
}

#[test]
fn nobody_waits_for_a_rank_that_fails() {
    for (fault, why) in [(Fault::Read(0), "no such file"), (Fault::Copy(1), "the device failed")] {
        let found = on_hosts(&[3], 1, Sharing::Share, fault);
        let told: Vec<&String> = found.iter().map(|found| found.as_ref().expect_err("one is no more")).collect();
        let of = |text: &str| told.iter().filter(|told| told.contains(text)).count();
        assert_eq!((of(why), of("has ended before the work was done")), (1, 2), "{told:?}");
    }
}

#[test]
fn other_options_on_a_rank_are_told() {
    let found: Vec<String> = thread::scope(|scope| {
        let run = |(rank, mut host): (usize, LocalGroup)| {
            scope.spawn(move || {
                let all = [Arc::default(), Arc::default()];
                let mut weights = Weights { all: &all, rank, program: 0, fault: Fault::None, reads: 0 };
                let sharing = [Sharing::Share, Sharing::Read][rank];
                load(&mut host, (rank, 0), sharing, &mut weights).expect_err("they differ").to_string()
            })
        };
        let ranks: Vec<_> = LocalGroup::new(2).into_iter().enumerate().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect()
    });
    let expected = "--weights: expected share on rank 1, as on rank 0, found read; give all ranks the same options";
    assert_eq!(found, [expected; 2]);
}

#[test]
fn a_rank_that_cannot_copy_reads_where_nobody_told_it_to_share() {
    let found = on_hosts(&[3], 1, Sharing::Auto, Fault::Map(1));
    for found in found {
        let found = found.expect("one reads instead");
        let of_each: Vec<_> = found.iter().map(|loaded| (loaded.from, loaded.why.as_deref())).collect();
        assert_eq!(of_each, [(None, None), (None, Some("no link")), (Some(0), None)]);
    }
}
