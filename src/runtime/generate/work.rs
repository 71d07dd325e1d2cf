//! Where a generator's requests come from and their results go.

use std::ops::ControlFlow;

use anyhow::{Context, Result};

use crate::runtime::{Finished, Request, RequestError, Scheduler};

/// What a generator gets that asks for a request.
#[derive(Clone, PartialEq, Debug)]
pub enum Next {
    /// This one.
    Request(Request),
    /// None now, but there may be one later: the generator goes on with what it has and asks again.
    Later,
    /// No more.
    End,
}

/// Where requests come from and their results go.
pub trait Work {
    /// The next request, or `None` after the last; not called again after that. It is called when a request is needed to
    /// fill the slots, and one ahead, so that an input of any length needs no more memory than the sequences at work.
    ///
    /// # Errors
    /// It cannot be had: the run ends.
    fn next(&mut self) -> Result<Option<Request>>;

    /// As [`Work::next`], for work that comes from elsewhere and need not be there yet. Only if `idle`, when nothing else runs, may it
    /// wait, and then not for long.
    ///
    /// # Errors
    /// It cannot be had: the run ends.
    fn poll(&mut self, idle: bool) -> Result<Next> {
        let _ = idle;
        Ok(self.next()?.map_or(Next::End, Next::Request))
    }

    /// Called between steps, with what is in work.
    ///
    /// # Errors
    /// The run ends.
    fn turn(&mut self, scheduler: &Scheduler) -> Result<()> {
        let _ = scheduler;
        Ok(())
    }

    /// Texts that end the request with that id, for whoever runs it elsewhere and decides there when it stops.
    fn stops(&self, id: u64) -> Vec<String> {
        let _ = id;
        Vec::new()
    }

    /// A new token of the request with that id, as `on_token` of [`Generator::generate`](super::Generator::generate) sees it.
    fn token(&mut self, id: u64, token: u32) -> ControlFlow<()>;

    /// What became of a request, in the order in which they end; `index` counts the requests given.
    ///
    /// # Errors
    /// It cannot be kept: the run ends.
    fn finished(&mut self, index: usize, result: Result<Finished, RequestError>) -> Result<()>;
}

/// Work, and how much of it was asked for.
pub(super) struct Feed<'w, W> {
    pub(super) work: &'w mut W,
    given: usize,
    /// Nothing more comes.
    pub(super) dry: bool,
}

impl<'w, W: Work> Feed<'w, W> {
    /// None of it yet.
    pub(super) fn new(work: &'w mut W) -> Self {
        Feed { work, given: 0, dry: false }
    }

    /// The next request and its number, if there is one now.
    pub(super) fn next(&mut self, idle: bool) -> Result<Option<(usize, Request)>> {
        if self.dry {
            return Ok(None);
        }
        match self.work.poll(idle)? {
            Next::Request(request) => {
                self.given += 1;
                Ok(Some((self.given - 1, request)))
            }
            Next::Later => Ok(None),
            Next::End => {
                self.dry = true;
                Ok(None)
            }
        }
    }
}

/// Requests that are all there, and results that are kept.
pub struct All<F> {
    requests: std::vec::IntoIter<Request>,
    on_token: F,
    stops: Vec<String>,
    results: Vec<Option<Result<Finished, RequestError>>>,
}

impl<F> All<F> {
    /// These requests; `on_token` as in [`Generator::generate`](super::Generator::generate).
    pub fn new(requests: Vec<Request>, on_token: F) -> Self {
        let results = requests.iter().map(|_| None).collect();
        All { requests: requests.into_iter(), on_token, stops: Vec::new(), results }
    }

    /// With the texts at which `on_token` stops a sequence, see [`Work::stops`].
    #[must_use]
    pub fn stopping_at(self, stops: &[String]) -> Self {
        All { stops: stops.to_vec(), ..self }
    }

    /// What became of them, in their order.
    ///
    /// # Errors
    /// They have not all ended.
    pub fn results(self) -> Result<Vec<Result<Finished, RequestError>>> {
        let results = self.results.into_iter().collect::<Option<Vec<_>>>();
        results.context("scheduler: expected every request to end, found one that did not; this is a bug")
    }
}

impl<F: FnMut(u64, u32) -> ControlFlow<()>> Work for All<F> {
    fn next(&mut self) -> Result<Option<Request>> {
        Ok(self.requests.next())
    }

    fn stops(&self, _: u64) -> Vec<String> {
        self.stops.clone()
    }

    fn token(&mut self, id: u64, token: u32) -> ControlFlow<()> {
        (self.on_token)(id, token)
    }

    fn finished(&mut self, index: usize, result: Result<Finished, RequestError>) -> Result<()> {
        self.results[index] = Some(result);
        Ok(())
    }
}
