//! `pipeline-parallel`: a model whose layers are spread over the ranks of a group, in stages of neighbouring layers, each rank with rows of
//! its own.
//!
//! - The rows of rank m are micro-batch m: there are as many as stages. A rank embeds its own rows and gives them to the first stage; each
//!   stage runs its layers over the rows of all ranks, one rank after the other, and gives them to the next; the last gives them back to the
//!   rank whose they are, which has the head of its own. So while a stage runs the rows of one rank, the others run those of others.
//! - Where several ranks have a stage, each with experts of its own, all this is so for the first ranks of the stages, for the second ones, and
//!   so on, none of which exchange with others here. Ranks of a stage run the same micro-batch at a time, the rows of another rank each.
//! - With rows go their positions and slots and the pages of that rank's slots, as far as the stages to come use them, up to the stage that
//!   has them itself. They go with the rows, not to all at the beginning, so that nobody waits for those whose turn is later.
//! - A stage has the state of its layers once for each rank, in slots and pages as that rank has dealt them.
//! - Rows of rank m come to stage k at time m + k, and back to their rank at time m + stages. All ranks exchange in the order of (time, m), as
//!   versions of the state `link` say: with one order of all exchanges, no rank waits for one that waits for it.
//!
//! No operator computes anything else than on one rank, so its results are the same to the bit.
//!
//! Needs: layers told by scopes `layers.N`; primitive operators; of integers, layers use the inputs `pos` and `slot` and a table of pages
//! alone. Leaves: primitive operators. Does nothing for a rank that has all layers.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::ir::{DType, Graph, Op, OpKind, Operand, Type, Users, ValueId};
use crate::passes::context::LayerShare;
use crate::passes::{PassContext, Patch, Rewrite};

/// The pass.
pub struct PipelineParallel;

impl Rewrite for PipelineParallel {
    fn propose(&self, graph: &Graph, _: &Users, at: usize, context: &PassContext) -> Option<Patch> {
        let share = context.layers.as_ref().filter(|share| share.stages.len() > 1 && at == 0)?;
        if graph.ops.iter().any(|op| matches!(op.kind, OpKind::Send { .. } | OpKind::Receive { .. })) {
            return None;
        }
        Staging::new(Stages::new(graph, share)?).patch()
    }
}

/// The layer that an operator of a scope belongs to: 3 of `layers.3.conv`.
pub(crate) fn layer(scope: &str) -> Option<u64> {
    scope.strip_prefix("layers.")?.split('.').next()?.parse().ok()
}

/// What of a graph is where.
struct Stages<'a> {
    graph: &'a Graph,
    share: &'a LayerShare,
    /// For each operator its stage; none of what each rank computes of its own rows, before and behind the layers.
    stage: Vec<Option<usize>>,
    /// For each value the stage that makes it.
    made_in: HashMap<ValueId, usize>,
    /// States that are updated, each version.
    updated: HashMap<ValueId, ValueId>,
}

impl<'a> Stages<'a> {
    /// `None` if layers take what follows from later ones.
    fn new(graph: &'a Graph, share: &'a LayerShare) -> Option<Stages<'a>> {
        let stage_of = |op: &Op| {
            let layer = layer(&op.scope)?;
            share.stage_of(layer)
        };
        let stage: Vec<Option<usize>> = graph.ops.iter().map(stage_of).collect();
        let (mut made_in, mut behind) = (HashMap::new(), HashSet::<ValueId>::new());
        for (op, stage) in graph.ops.iter().zip(&stage) {
            let late = |value: ValueId| match stage {
                Some(stage) => behind.contains(&value) || made_in.get(&value).is_some_and(|made| made > stage),
                None => false,
            };
            if op.uses().any(late) || !op.body.is_empty() {
                return None;
            }
            match stage {
                Some(stage) => made_in.extend(op.results.iter().map(|&result| (result, *stage))),
                None if op.uses().any(|value| behind.contains(&value) || made_in.contains_key(&value)) => {
                    behind.extend(&op.results);
                }
                None => {}
            }
        }
        let roots = graph.state_roots();
        let changing: HashSet<ValueId> =
            graph.ops.iter().flat_map(Op::state_updates).filter_map(|(old, _)| roots.get(&old).copied()).collect();
        let updated = roots.into_iter().filter(|(_, root)| changing.contains(root)).collect();
        Some(Stages { graph, share, stage, made_in, updated })
    }

    fn count(&self) -> usize {
        self.share.stages.len()
    }

    /// The rank with which this one exchanges that has a stage, and whose rows are the micro-batch of that number.
    fn rank(&self, stage: usize) -> usize {
        stage * self.share.width + self.share.rank % self.share.width
    }

    /// Ranks of the group.
    fn ranks(&self) -> u64 {
        (self.count() * self.share.width) as u64
    }

    /// What operators of these stages take, but for states that they update.
    fn taken(&self, stages: std::ops::Range<usize>) -> BTreeSet<ValueId> {
        let inside =
            self.graph.ops.iter().zip(&self.stage).filter(|(_, stage)| stage.is_some_and(|s| stages.contains(&s)));
        inside.flat_map(|(op, _)| op.uses()).filter(|value| !self.updated.contains_key(value)).collect()
    }

    /// What each rank takes of its own rows behind the layers.
    fn taken_behind(&self) -> BTreeSet<ValueId> {
        let outside = self.graph.ops.iter().zip(&self.stage).filter(|(_, stage)| stage.is_none());
        let outputs = self.graph.outputs.iter().copied();
        outside.flat_map(|(op, _)| op.uses()).chain(outputs).filter(|value| !self.updated.contains_key(value)).collect()
    }

    /// What goes into a stage with the rows of a rank, in the order in which it is sent; for the number behind the last stage, what goes
    /// back to that rank. `None` if layers take other integers than those that can be sent.
    fn payload(&self, stage: usize, of: usize) -> Option<Vec<ValueId>> {
        let count = self.count();
        let made_before = |value: &ValueId| self.made_in.get(value).is_some_and(|&made| made < stage);
        let mut sent: BTreeSet<ValueId> =
            self.taken(stage..count).union(&self.taken_behind()).copied().filter(made_before).collect();
        if stage != of && stage < count {
            // Its own stage has them.
            let end = if of > stage { of } else { count };
            sent.extend(self.taken(stage..end).into_iter().filter(|value| !self.made_in.contains_key(value)));
        }
        let is_float = |value: &ValueId| self.graph.ty(*value).dtype.is_float();
        let (mut payload, integers): (Vec<ValueId>, Vec<ValueId>) = sent.into_iter().partition(is_float);
        let input = |name: &str| self.graph.inputs.iter().copied().find(|&input| self.graph.value(input).name == name);
        let rows = [input("pos"), input("slot")];
        let (tables, integers): (Vec<ValueId>, Vec<ValueId>) =
            integers.into_iter().partition(|value| self.graph.states.contains(value));
        if !integers.is_empty() || !tables.is_empty() {
            payload.extend(rows.into_iter().collect::<Option<Vec<_>>>()?);
        }
        let known = integers.iter().all(|&value| rows.contains(&Some(value)));
        payload.extend(&tables);
        (known && tables.len() < 2 && self.graph.ty(*payload.first()?).dtype.is_float()).then_some(payload)
    }
}

/// The program of one rank.
struct Staging<'a> {
    stages: Stages<'a>,
    /// The number of its stage, and of the micro-batch of its own rows.
    own: usize,
    /// For each micro-batch, what stands for a value.
    of: Vec<HashMap<ValueId, ValueId>>,
    /// The last version of the link.
    link: ValueId,
    states: Vec<ValueId>,
    inserted: Vec<Op>,
    patch: Patch,
}

/// What a rank does with a micro-batch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Task {
    /// Receives them for a stage, or, for the number behind the last stage, its own back.
    Receive(usize),
    /// Runs its stage.
    Run,
    /// Sends them to a stage, or back.
    Send(usize),
}

impl<'a> Staging<'a> {
    fn new(stages: Stages<'a>) -> Staging<'a> {
        let mut patch = Patch::new(stages.graph);
        let link = patch.value("link", Type::new(DType::I32, [1u64]));
        let of = vec![HashMap::new(); stages.count()];
        Staging { own: stages.share.stage(), stages, of, link, states: vec![link], inserted: vec![], patch }
    }

    fn patch(mut self) -> Option<Patch> {
        for (of, task) in self.tasks() {
            let result = match task {
                Task::Receive(stage) => self.receive(stage, of),
                Task::Run => self.run(of),
                Task::Send(stage) => self.send(stage, of),
            };
            result?;
        }
        let (states, outputs) = self.ends();
        let Staging { stages, own, of, inserted, mut patch, .. } = self;
        for (at, _) in stages.stage.iter().enumerate().filter(|(_, stage)| stage.is_some_and(|stage| stage != own)) {
            patch = patch.remove(at);
        }
        patch = inserted.into_iter().fold(patch, Patch::insert);
        patch = of[own].iter().fold(patch, |patch, (&value, &received)| patch.replace(value, received.into()));
        Some(patch.with_ends(states, outputs))
    }

    /// What this rank does with which micro-batch, by time: exchanges, in the order of these; then it runs the one that has come.
    fn tasks(&self) -> Vec<(usize, Task)> {
        let (own, count) = (self.own, self.stages.count());
        let mut timed = vec![(own, false, own, Task::Send(0)), (own + count, false, own, Task::Receive(count))];
        for of in 0..count {
            let time = of + own;
            timed.push((time, false, of, Task::Receive(own)));
            timed.push((time, true, of, Task::Run));
            timed.push((time + 1, false, of, Task::Send(own + 1)));
        }
        timed.retain(|&(_, _, of, task)| match task {
            // Nothing is sent from a rank to itself: the first's rows into the first stage, the last's out of the last.
            Task::Send(0) | Task::Receive(0) => (of, own) != (0, 0),
            Task::Send(stage) | Task::Receive(stage) if stage == count => (of, own) != (count - 1, count - 1),
            _ => true,
        });
        timed.sort_unstable();
        timed.into_iter().map(|(_, _, of, task)| (of, task)).collect()
    }

    /// What stands for a value in a micro-batch; the value itself, where its rows are this rank's.
    fn value(&self, of: usize, value: ValueId) -> Option<ValueId> {
        self.of[of].get(&value).copied().or((of == self.own).then_some(value))
    }

    fn name(&self, value: ValueId, of: usize) -> String {
        format!("{}.of{}", self.stages.graph.value(value).name, self.stages.rank(of))
    }

    /// An exchange: what follows the link of operands and of results.
    fn exchange(&mut self, kind: OpKind, of: usize, operands: Vec<ValueId>, results: Vec<ValueId>) {
        let scope = format!("rank{}", self.stages.rank(of));
        let next = self.patch.value("link.next", Type::new(DType::I32, [1u64]));
        let link = std::mem::replace(&mut self.link, next);
        let operands = std::iter::once(link).chain(operands).map(Operand::Value).collect();
        let results = std::iter::once(next).chain(results).collect();
        self.inserted.push(Op::new(kind, operands, results, &scope));
    }

    fn send(&mut self, stage: usize, of: usize) -> Option<()> {
        let count = self.stages.count();
        let to = self.stages.rank(if stage == count { of } else { stage }) as u64;
        let payload = self.stages.payload(stage, of)?;
        let operands = payload.into_iter().map(|value| self.value(of, value)).collect::<Option<_>>()?;
        self.exchange(OpKind::Send { to, ranks: self.stages.ranks() }, of, operands, vec![]);
        Some(())
    }

    fn receive(&mut self, stage: usize, of: usize) -> Option<()> {
        let from = self.stages.rank(if stage == 0 { of } else { stage - 1 }) as u64;
        let payload = self.stages.payload(stage, of)?;
        let mut results = vec![];
        for value in payload {
            let received = self.patch.value(&self.name(value, of), self.stages.graph.ty(value).clone());
            self.of[of].insert(value, received);
            results.push(received);
        }
        self.exchange(OpKind::Receive { from, ranks: self.stages.ranks() }, of, vec![], results);
        Some(())
    }

    /// The stage's operators over a micro-batch, with states of their own; over its own rows they stay as they are.
    fn run(&mut self, of: usize) -> Option<()> {
        if of == self.own {
            return Some(());
        }
        let graph = self.stages.graph;
        let own = graph.ops.iter().zip(&self.stages.stage).filter(|(_, stage)| **stage == Some(self.own));
        for op in own.map(|(op, _)| op).collect::<Vec<_>>() {
            let mut operands = vec![];
            for &operand in &op.operands {
                operands.push(match operand {
                    Operand::Value(value) if self.stages.updated.get(&value) == Some(&value) => {
                        self.state(value, of).into()
                    }
                    Operand::Value(value) => self.value(of, value)?.into(),
                    other => other,
                });
            }
            let mut results = vec![];
            for &result in &op.results {
                let made = self.patch.value(&self.name(result, of), graph.ty(result).clone());
                self.of[of].insert(result, made);
                results.push(made);
            }
            self.inserted.push(Op::new(op.kind.clone(), operands, results, &op.scope));
        }
        Some(())
    }

    /// A state, for a micro-batch.
    fn state(&mut self, state: ValueId, of: usize) -> ValueId {
        if let Some(&known) = self.of[of].get(&state) {
            return known;
        }
        let own = self.patch.value(&self.name(state, of), self.stages.graph.ty(state).clone());
        self.of[of].insert(state, own);
        self.states.push(own);
        own
    }

    /// The states of the rank, and what it returns.
    fn ends(&self) -> (Vec<ValueId>, Vec<ValueId>) {
        let Stages { graph, stage, made_in, updated, .. } = &self.stages;
        let kept = graph.ops.iter().zip(stage).filter(|(_, stage)| stage.is_none_or(|stage| stage == self.own));
        let used: HashSet<ValueId> = kept.map(|(op, _)| op).chain(&self.inserted).flat_map(Op::uses).collect();
        let states =
            graph.states.iter().copied().filter(|state| used.contains(state)).chain(self.states.iter().copied());
        let mut outputs = vec![];
        for &output in &graph.outputs {
            let stage = made_in.get(&output).filter(|_| updated.contains_key(&output));
            match stage {
                None => outputs.push(output),
                Some(&stage) if stage == self.own => {
                    let others = (0..self.stages.count()).filter(|&of| of != self.own);
                    outputs.push(output);
                    outputs.extend(others.filter_map(|of| self.of[of].get(&output).copied()));
                }
                Some(_) => {}
            }
        }
        outputs.push(self.link);
        (states.collect(), outputs)
    }
}
