//! Reads the text form that a graph prints as.
//!
//! Lines matter little: a statement begins a line, and what follows a comma, a bracket or a mark may stand on the next.
//! Values get their ids in the order inputs, states, results as they appear, a fused operator's results before its body.
//! Numbers are finite, and whole numbers fit 64 bits. Fused operators do not nest. A name is known from where it first appears;
//! whether a fused operator hides it is for the verifier to say.

use std::collections::HashMap;
use std::str::FromStr;

use crate::ir::cursor::{Cursor, Fallible, ParseError, is_number};
use crate::ir::lexer::{Spanned, Token};
use crate::ir::location::{OpLines, SourceMap};
use crate::ir::{Attribute, Graph, Layout, Op, OpKind, Operand, Stage, Type, Value, ValueId, Weight, WeightId};

/// A graph and where in the text its entities stand.
#[derive(Clone, PartialEq, Debug)]
pub struct ParsedGraph {
    /// The graph.
    pub graph: Graph,
    /// The line of each entity.
    pub lines: SourceMap,
}

/// Reads a graph.
///
/// # Errors
/// The first fault of form, name or number. A parsed graph is not yet a verified one.
pub fn parse(text: &str) -> Result<ParsedGraph, ParseError> {
    let parser = Parser {
        text: Cursor::new(text),
        graph: Graph::new(""),
        lines: SourceMap::default(),
        values: HashMap::new(),
        weights: HashMap::new(),
        promised: HashMap::new(),
    };
    if u32::try_from(text.len()).is_err() {
        return Err(parser.text.expected("a text shorter than 4 GiB"));
    }
    parser.graph()
}

impl FromStr for Graph {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse(text).map(|parsed| parsed.graph)
    }
}

struct Parser<'a> {
    text: Cursor<'a>,
    graph: Graph,
    lines: SourceMap,
    /// Each name with the line that binds it.
    values: HashMap<&'a str, (ValueId, usize)>,
    weights: HashMap<&'a str, (WeightId, usize)>,
    /// While a body is read: the fused operator's results that the body has not yet defined.
    promised: HashMap<&'a str, ValueId>,
}

impl<'a> Parser<'a> {
    fn graph(mut self) -> Fallible<ParsedGraph> {
        self.text.keyword("graph")?;
        self.lines.graph = self.text.last.line;
        self.graph.name = self.text.weight_name("the graph's name, such as `@main`")?.to_owned();
        self.text.mark('(')?;
        if !self.text.take(')') {
            loop {
                let name = self.text.value_name("an input, such as `%x: f32[T,8]`")?;
                let place = self.text.last;
                self.text.mark(':')?;
                let ty = self.text.ty()?;
                let id = self.bind(name, place, ty)?;
                self.graph.inputs.push(id);
                self.lines.inputs.push(place.line);
                if !self.text.take(',') {
                    break;
                }
            }
            self.text.mark(')')?;
        }
        self.text.mark('{')?;
        loop {
            self.statement_begins()?;
            match self.text.next.token {
                Token::Word("state") => self.state()?,
                Token::Word("weight") => self.weight()?,
                Token::Word("return") => break,
                Token::Mark('}') | Token::End => return Err(self.text.expected("an operator or `return`")),
                _ => {
                    let (op, lines) = self.op(false)?;
                    self.graph.ops.push(op);
                    self.lines.ops.push(lines);
                }
            }
        }
        self.text.keyword("return")?;
        self.lines.outputs = self.text.last.line;
        while self.text.next.token != Token::Mark('}') {
            let id = self.value_use()?;
            self.graph.outputs.push(id);
            if !self.text.take(',') {
                break;
            }
        }
        self.text.mark('}')?;
        match self.text.next.token {
            Token::End => Ok(ParsedGraph { graph: self.graph, lines: self.lines }),
            _ => Err(self.text.expected("nothing after the graph")),
        }
    }

    fn state(&mut self) -> Fallible<()> {
        self.declaration_comes_first()?;
        self.text.advance();
        let name = self.text.value_name("the state's name, such as `%kv`")?;
        let place = self.text.last;
        self.text.mark(':')?;
        let ty = self.text.ty()?;
        let id = self.bind(name, place, ty)?;
        self.graph.states.push(id);
        self.lines.states.push(place.line);
        Ok(())
    }

    fn weight(&mut self) -> Fallible<()> {
        self.declaration_comes_first()?;
        self.text.advance();
        let name = self.text.weight_name("the weight's name, such as `@w`")?;
        let place = self.text.last;
        if let Some((_, line)) = self.weights.get(name) {
            return Err(self.text.error_at(place, format!("`@{name}` is already declared on line {line}")));
        }
        self.text.mark(':')?;
        let ty = self.text.ty()?;
        let layout = if self.text.take('=') { self.layout()? } else { Layout::Tensor };
        self.weights.insert(name, (WeightId::new(self.graph.weights.len()), place.line));
        self.graph.weights.push(Weight { name: name.to_owned(), ty, layout });
        self.lines.weights.push(place.line);
        Ok(())
    }

    fn layout(&mut self) -> Fallible<Layout> {
        let word = self.text.word("`concat` or `take`")?;
        let place = self.text.last;
        match word {
            "concat" => self.concat(place),
            "take" => self.taken(place),
            other => Err(self.text.error_at(place, format!("expected `concat` or `take`, found `{other}`"))),
        }
    }

    fn taken(&mut self, place: Spanned<'a>) -> Fallible<Layout> {
        self.text.mark('(')?;
        let of = self.weight_use()?;
        self.text.mark(')')?;
        match &self.text.attributes()?[..] {
            [(name, Attribute::Ints(indices))] if name == "indices" => {
                Ok(Layout::Take { of, indices: indices.clone() })
            }
            _ => Err(self.text.error_at(place, "`take` needs one attribute, `indices`, a list of whole numbers")),
        }
    }

    fn concat(&mut self, place: Spanned<'a>) -> Fallible<Layout> {
        self.text.mark('(')?;
        let mut parts = vec![];
        while self.text.next.token != Token::Mark(')') {
            parts.push(self.weight_use()?);
            if !self.text.take(',') {
                break;
            }
        }
        self.text.mark(')')?;
        let (mut axis, mut block) = (None, None);
        for (name, value) in self.text.attributes()? {
            match (&name[..], value) {
                ("axis", Attribute::Int(n)) => axis = Some(n),
                ("block", Attribute::Int(n)) => block = Some(n),
                ("axis" | "block", other) => {
                    return Err(self.text.error_at(place, format!("`{name}`: expected a whole number, found {other}")));
                }
                _ => return Err(self.text.error_at(place, format!("`concat` has no attribute `{name}`"))),
            }
        }
        let axis = axis.ok_or_else(|| self.text.error_at(place, "`concat` needs the attribute `axis`"))?;
        Ok(Layout::Concat { axis, block, parts })
    }

    fn op(&mut self, in_body: bool) -> Fallible<(Op, OpLines)> {
        let mut lines = OpLines { line: self.text.next.line, body: vec![] };
        let mut names = vec![];
        if matches!(self.text.next.token, Token::Value(_)) {
            loop {
                let name = self.text.value_name("a result")?;
                names.push((name, self.text.last));
                if !self.text.take(',') {
                    break;
                }
            }
            self.text.mark('=')?;
        }
        let mnemonic = self.text.word("an operator")?;
        let place = self.text.last;
        let stages = if mnemonic == "fused" { Some(self.stages(place, in_body)?) } else { None };
        let mut operands = vec![];
        if !self.text.next.starts_line && self.at_operand() {
            operands.push(self.operand()?);
            while self.text.take(',') {
                operands.push(self.operand()?);
            }
        }
        let kind = match stages {
            Some(stages) => OpKind::Fused(stages),
            None => {
                let attributes = self.text.attributes()?;
                OpKind::from_text(mnemonic, &attributes).map_err(|message| self.text.error_at(place, message))?
            }
        };
        let promised: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        let results = self.results(names, place)?;
        let scope = if !self.text.next.starts_line && self.text.next.token == Token::Word("in") {
            self.text.advance();
            self.text.word("a scope, such as `layers.0.conv`")?.to_owned()
        } else {
            String::new()
        };
        let mut op = Op { kind, operands, results, scope, body: vec![] };
        if matches!(op.kind, OpKind::Fused(_)) {
            self.text.mark('{')?;
            self.promised = promised.into_iter().zip(op.results.iter().copied()).collect();
            while self.text.next.token != Token::Mark('}') {
                self.statement_begins()?;
                let (inner, inner_lines) = self.op(true)?;
                op.body.push(inner);
                lines.body.push(inner_lines.line);
            }
            self.promised.clear();
            self.text.mark('}')?;
        }
        Ok((op, lines))
    }

    /// The results' types, and their ids.
    fn results(&mut self, names: Vec<(&'a str, Spanned<'a>)>, place: Spanned<'a>) -> Fallible<Vec<ValueId>> {
        let mut types = vec![];
        if !names.is_empty() {
            if self.text.next.token != Token::Mark(':') {
                return Err(self.text.expected("`:` and the types of the results"));
            }
            self.text.advance();
            types.push(self.text.ty()?);
            while self.text.take(',') {
                types.push(self.text.ty()?);
            }
        }
        if types.len() != names.len() {
            let message = format!("{} results are named, but {} types are given", names.len(), types.len());
            return Err(self.text.error_at(place, message));
        }
        let mut results = Vec::with_capacity(names.len());
        for ((name, place), ty) in names.into_iter().zip(types) {
            let promised = self.promised.remove(name);
            if let Some(id) = promised {
                let expected = self.graph.ty(id);
                if *expected != ty {
                    let message = format!("`%{name}` has type {expected} in the fused operator, found {ty}");
                    return Err(self.text.error_at(place, message));
                }
                results.push(id);
            } else {
                results.push(self.bind(name, place, ty)?);
            }
        }
        Ok(results)
    }

    fn stages(&mut self, place: Spanned<'a>, in_body: bool) -> Fallible<Vec<Stage>> {
        if in_body {
            return Err(self.text.error_at(place, "fused operators do not nest"));
        }
        self.text.mark('[')?;
        if self.text.take(']') {
            return Ok(vec![]);
        }
        let list = self.text.word("stages, such as `norm+matmul`")?;
        let mut stages = vec![];
        for name in list.split('+') {
            match Stage::ALL.iter().find(|(_, n)| *n == name) {
                Some((stage, _)) => stages.push(*stage),
                None => return Err(self.text.error_at(self.text.last, format!("unknown stage `{name}`"))),
            }
        }
        self.text.mark(']')?;
        Ok(stages)
    }

    fn at_operand(&self) -> bool {
        match self.text.next.token {
            Token::Value(_) | Token::Weight(_) => true,
            Token::Word(word) => is_number(word),
            _ => false,
        }
    }

    fn operand(&mut self) -> Fallible<Operand> {
        match self.text.next.token {
            Token::Value(_) => self.value_use().map(Operand::Value),
            Token::Weight(_) => self.weight_use().map(Operand::Weight),
            Token::Word(word) if is_number(word) => {
                self.text.advance();
                self.text.decimal(self.text.last, word).map(Operand::Const)
            }
            _ => Err(self.text.expected("an operand: a value, a weight or a number")),
        }
    }

    fn statement_begins(&self) -> Fallible<()> {
        if self.text.next.starts_line { Ok(()) } else { Err(self.text.expected("a new line")) }
    }

    fn declaration_comes_first(&self) -> Fallible<()> {
        if self.graph.ops.is_empty() {
            return Ok(());
        }
        Err(self.text.error_at(self.text.next, "states and weights stand before the first operator"))
    }

    /// Binds a new value to a name.
    fn bind(&mut self, name: &'a str, place: Spanned<'a>, ty: Type) -> Fallible<ValueId> {
        if let Some((_, line)) = self.values.get(name) {
            return Err(self.text.error_at(place, format!("`%{name}` is already defined on line {line}")));
        }
        let id = ValueId::new(self.graph.values.len());
        self.graph.values.push(Value { name: name.to_owned(), ty });
        self.values.insert(name, (id, place.line));
        Ok(id)
    }

    fn value_use(&mut self) -> Fallible<ValueId> {
        let name = self.text.value_name("a value")?;
        match self.values.get(name) {
            Some((id, _)) => Ok(*id),
            None => Err(self.text.error_at(
                self.text.last,
                format!("unknown value `%{name}`: it must be an input, a state or the result of an operator above"),
            )),
        }
    }

    fn weight_use(&mut self) -> Fallible<WeightId> {
        let name = self.text.weight_name("a weight")?;
        match self.weights.get(name) {
            Some((id, _)) => Ok(*id),
            None => {
                Err(self.text.error_at(self.text.last, format!("unknown weight `@{name}`: it must be declared above")))
            }
        }
    }
}

#[cfg(test)]
mod tests;
