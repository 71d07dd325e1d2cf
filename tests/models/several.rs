//! What tests of plans of several ranks share.

use std::path::Path;

use lfm2c::codegen::CompileOptions;
use lfm2c::plan::PlanFile;
use lfm2c::runtime::cpu::CpuEnsemble;
use lfm2c::runtime::group::LocalGroup;
use lfm2c::runtime::{Finished, Options, Request};

use crate::common::*;

/// All ranks in one process, with everything not live poisoned.
pub fn ensemble(file: &PlanFile, directory: Option<&Path>) -> CpuEnsemble {
    let ranks = 0..file.manifest.ranks.len();
    CpuEnsemble::new(ranks.map(|rank| cpu_rank(file, rank, directory).with_poison(true)).collect()).expect("all ranks")
}

/// Requests of many lengths: some longer than the largest bucket, some of no new token.
pub fn requests(count: u64, vocab: u64) -> Vec<Request> {
    let request = |i: u64| {
        let length = [1, 3, 17, 40, 2, 70][i as usize % 6] + i as usize % 5;
        Request {
            id: i,
            eos: vec![i as u32 % 9],
            ..request(&tokens(i, length, vocab), [6, 1, 12, 0, 9][i as usize % 5])
        }
    };
    (0..count).map(request).collect()
}

/// Compiles a golden's directory for several ranks, and checks that they choose its tokens.
pub fn goldens_agree_on_ranks(name: &str, options: &CompileOptions) {
    let directory = project("tests/goldens").join(name);
    let file = directory_plan(&directory, options);
    let mut executor = ensemble(&file, Some(&directory));
    for (n, golden) in goldens(&directory) {
        let found = run(&mut executor, vec![request(&golden.ids, golden.greedy.len())], Options::default()).remove(0);
        assert_eq!(found.tokens, golden.greedy, "{name}, prompt {n}");
    }
}

/// What each request gives where each rank is a thread with requests of its own, in lockstep with the others: the last has none, the first as
/// many as all others together, and prompts go in other chunks on each.
pub fn on_threads(file: &PlanFile, lookahead: usize, requests: &[Request], options: Options) -> Vec<Finished> {
    let ranks = file.manifest.ranks.len();
    let of_rank = |i: usize| if i.is_multiple_of(2) { 0 } else { (i / 2) % (ranks - 1) };
    let mut found = vec![None; requests.len()];
    std::thread::scope(|scope| {
        let threads = LocalGroup::new(ranks).into_iter().enumerate().map(|(rank, group)| {
            let options = Options { chunk: Some(9 + rank), ..options };
            scope.spawn(move || {
                let executor = cpu_rank(file, rank, None).with_poison(true).with_lookahead(lookahead);
                let mut executor = executor.with_group(Box::new(group)).expect("it is one of the plan's ranks");
                let own = requests.iter().enumerate().filter(|(i, _)| of_rank(*i) == rank);
                let (numbers, own): (Vec<usize>, Vec<Request>) = own.map(|(i, request)| (i, request.clone())).unzip();
                numbers.into_iter().zip(run(&mut executor, own, options)).collect::<Vec<_>>()
            })
        });
        for thread in threads.collect::<Vec<_>>() {
            for (i, result) in thread.join().expect("it does not panic") {
                found[i] = Some(result);
            }
        }
    });
    let result = |(i, result): (usize, Option<_>)| result.unwrap_or_else(|| panic!("request {i} has no result"));
    found.into_iter().enumerate().map(result).collect()
}
