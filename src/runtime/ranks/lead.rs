//! What rank 0 does in a round: it deals requests and takes results, between the steps of its own replica.
//!
//! A request goes to the replica with the fewest rows left to run, of those that have room. A replica has room until it was given what its
//! slots and pages hold and `AHEAD` requests more, so that it does not wait for rank 0 when a sequence ends, which may be in a step of
//! its own; few enough that nothing long waits behind a slow rank while another has nothing to do. So the input is read no further than
//! that either.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::thread::sleep;

use anyhow::{Context, Result, bail};

use super::message::{Ended, Job};
use super::{Message, NAP, Ranks, Summary, unexpected};
use crate::plan::Manifest;
use crate::runtime::{Executor, Finished, Generator, Next, Options, Request, RequestError, Scheduler, Work};

/// Requests given beyond what a replica has room for.
const AHEAD: usize = 2;

/// Who gets a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// One replica.
    Deal,
    /// One of the first so many replicas; the others have nothing to do.
    DealTo(usize),
    /// Every replica, as to warm up; results are those of rank 0.
    Copy,
}

/// Runs work on all ranks, which are waiting for a round; returns what each did. The generator is rank 0's, made with the same options.
///
/// # Errors
/// The work, the executor or the transport failed.
pub fn lead<E: Executor + ?Sized>(
    ranks: &mut Ranks,
    generator: &mut Generator<'_, E>,
    work: &mut impl Work,
    options: Options,
    mode: Mode,
) -> Result<Vec<Summary>> {
    ranks.send_to_others(&Message::Round(options.into()))?;
    let mut lead = Lead::new(ranks, generator.manifest(), work, mode)?;
    generator.run(&mut lead)?;
    lead.close(generator)
}

/// Work that is dealt to replicas.
struct Lead<'r, W> {
    ranks: &'r mut Ranks,
    work: &'r mut W,
    mode: Mode,
    /// Tells what a replica has room for, and whether it could run a request at all.
    rules: Scheduler,
    replicas: Vec<Replica>,
    /// Requests taken from the work.
    given: u64,
    dry: bool,
    /// For this rank's own replica.
    own: VecDeque<(u64, Request)>,
    /// By the generator's index: the request's number in the round.
    own_numbers: BTreeMap<usize, u64>,
    own_given: usize,
}

/// What is known of a replica.
#[derive(Default)]
struct Replica {
    /// Requests given whose results are not there, in their order.
    at_work: VecDeque<Given>,
    /// Requests given in all.
    given: u64,
    /// What it said last: of so many requests, so many rows left.
    reported: (u64, u64),
    /// Sequences that have ended.
    sequences: u64,
    summary: Option<Summary>,
}

struct Given {
    number: u64,
    /// Which of those given to this replica it is.
    place: u64,
    id: u64,
    rows: u64,
    pages: usize,
}

impl Replica {
    fn remaining(&self) -> u64 {
        let since = self.at_work.iter().filter(|given| given.place >= self.reported.0);
        self.reported.1.saturating_add(since.map(|given| given.rows).sum())
    }

    /// Whether another request may be given, if so many sequences with so many pages fit.
    fn has_room(&self, (slots, pages): (usize, usize)) -> bool {
        let mut left = pages;
        let fit = self.at_work.iter().take(slots).take_while(|given| {
            let fits = given.pages <= left;
            left = left.saturating_sub(given.pages);
            fits
        });
        self.at_work.len() < fit.count() + AHEAD
    }

    /// Takes away what has ended.
    fn end(&mut self, number: u64) -> Option<Given> {
        let at = self.at_work.iter().position(|given| given.number == number)?;
        self.sequences += 1;
        self.at_work.remove(at)
    }
}

impl<'r, W: Work> Lead<'r, W> {
    fn new(ranks: &'r mut Ranks, manifest: &Manifest, work: &'r mut W, mode: Mode) -> Result<Self> {
        let rules = Scheduler::new(manifest, None, 1)?;
        let replicas = (0..ranks.size()).map(|_| Replica::default()).collect();
        Ok(Lead {
            ranks,
            work,
            mode,
            rules,
            replicas,
            given: 0,
            dry: false,
            own: VecDeque::new(),
            own_numbers: BTreeMap::new(),
            own_given: 0,
        })
    }

    /// Takes what has come and deals what there is room for; says whether anything came.
    fn serve(&mut self) -> Result<bool> {
        let mut came = false;
        while let Some((from, message)) = self.ranks.receive()? {
            self.hear(from, message)?;
            came = true;
        }
        self.deal()?;
        Ok(came)
    }

    fn hear(&mut self, from: usize, message: Message) -> Result<()> {
        match message {
            Message::Report { received, remaining } => self.replicas[from].reported = (received, remaining),
            Message::Summary(summary) => self.replicas[from].summary = Some(summary),
            Message::Ended(ended) => self.take(from, ended)?,
            other => bail!(unexpected(&self.ranks.peers()[from], "a result", &other)),
        }
        Ok(())
    }

    fn take(&mut self, from: usize, ended: Ended) -> Result<()> {
        let number = ended.number;
        let Some(given) = self.replicas[from].end(number) else {
            bail!(
                "{}: expected the result of a request given to it, found that of {number}; this is a bug",
                self.ranks.peers()[from]
            );
        };
        if self.mode == Mode::Copy {
            return Ok(());
        }
        let finished = ended.into_finished();
        for &token in &finished.tokens {
            // Where it stops was decided where it ran, by the same rule.
            let _ = self.work.token(given.id, token);
        }
        self.work.finished(number as usize, Ok(finished))
    }

    fn deal(&mut self) -> Result<()> {
        while !self.dry {
            let capacity = self.rules.capacity();
            let taking = match self.mode {
                Mode::DealTo(replicas) => &self.replicas[..replicas.clamp(1, self.replicas.len())],
                Mode::Deal | Mode::Copy => &self.replicas[..],
            };
            let with_room = taking.iter().enumerate().filter(|(_, replica)| replica.has_room(capacity));
            let all = with_room.clone().count() == self.replicas.len();
            let Some((to, _)) = with_room.min_by_key(|(_, replica)| replica.remaining()) else { return Ok(()) };
            if self.mode == Mode::Copy && !all {
                return Ok(());
            }
            let Some(request) = self.work.next()? else {
                self.dry = true;
                return self.ranks.send_to_others(&Message::Close);
            };
            let number = self.given;
            self.given += 1;
            if let Err(error) = self.rules.check(&request) {
                self.work.finished(number as usize, Err(error))?;
                continue;
            }
            match self.mode {
                Mode::Deal | Mode::DealTo(_) => self.give(to, number, request)?,
                Mode::Copy => (0..self.replicas.len()).try_for_each(|to| self.give(to, number, request.clone()))?,
            }
        }
        Ok(())
    }

    fn give(&mut self, to: usize, number: u64, request: Request) -> Result<()> {
        let pages = self.rules.pages_for(&request);
        let replica = &mut self.replicas[to];
        let given = Given { number, place: replica.given, id: request.id, rows: request.rows() as u64, pages };
        replica.given += 1;
        replica.at_work.push_back(given);
        if to == self.ranks.rank() {
            self.own.push_back((number, request));
            return Ok(());
        }
        let stops = self.work.stops(request.id);
        self.ranks.send(to, &Message::Job(Job::new(number, &request, stops)))
    }

    fn own_replica(&mut self) -> &mut Replica {
        let rank = self.ranks.rank();
        &mut self.replicas[rank]
    }

    /// Waits for the summaries of the others.
    fn close<E: Executor + ?Sized>(mut self, generator: &Generator<'_, E>) -> Result<Vec<Summary>> {
        let own = Summary { sequences: self.own_replica().sequences, statistics: generator.statistics().clone() };
        self.own_replica().summary = Some(own);
        while self.replicas.iter().any(|replica| replica.summary.is_none()) {
            let (from, message) = self.ranks.wait()?;
            self.hear(from, message)?;
        }
        Ok(self.replicas.into_iter().filter_map(|replica| replica.summary).collect())
    }
}

impl<W: Work> Work for Lead<'_, W> {
    fn next(&mut self) -> Result<Option<Request>> {
        bail!("work of several ranks is polled; this is a bug")
    }

    fn poll(&mut self, idle: bool) -> Result<Next> {
        let came = self.serve()?;
        if let Some((number, request)) = self.own.pop_front() {
            self.own_numbers.insert(self.own_given, number);
            self.own_given += 1;
            return Ok(Next::Request(request));
        }
        if self.dry && self.replicas.iter().all(|replica| replica.at_work.is_empty()) {
            return Ok(Next::End);
        }
        if idle && !came {
            sleep(NAP);
        }
        Ok(Next::Later)
    }

    fn turn(&mut self, scheduler: &Scheduler) -> Result<()> {
        let waiting: usize = self.own.iter().map(|(_, request)| request.rows()).sum();
        let replica = self.own_replica();
        replica.reported = (replica.given, (scheduler.remaining_rows() + waiting) as u64);
        self.serve().map(|_| ())
    }

    fn token(&mut self, id: u64, token: u32) -> ControlFlow<()> {
        self.work.token(id, token)
    }

    fn finished(&mut self, index: usize, result: Result<Finished, RequestError>) -> Result<()> {
        let number = self.own_numbers.remove(&index).context("a result of no request; this is a bug")?;
        self.own_replica().end(number);
        self.work.finished(number as usize, result)
    }
}
