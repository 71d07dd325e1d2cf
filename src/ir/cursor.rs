//! What the parser stands on: one token of lookahead over a text, and the parts of a statement that name nothing:
//! words, numbers, types, attributes. Also the errors, as only here the place in the text is known.

use std::fmt;

use crate::ir::lexer::{Lexer, Spanned, Token};
use crate::ir::{Attribute, DType, Dim, Sym, Type};

/// Characters of a long source line that an error shows.
const EXCERPT_CHARS: usize = 160;

/// More than any operator has.
const MOST_ATTRIBUTES: usize = 16;

/// Why a text is no graph. Displays the line with the culprit underlined.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    excerpt: String,
    /// Characters of the excerpt before the culprit, and of the culprit.
    indent: usize,
    width: usize,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "line {}, column {}: {}", self.line, self.column, self.message)?;
        writeln!(f, "  {}", self.excerpt)?;
        write!(f, "  {:indent$}^{:~<tail$}", "", "", indent = self.indent, tail = self.width.saturating_sub(1))
    }
}

impl std::error::Error for ParseError {}

pub(crate) type Fallible<T> = Result<T, ParseError>;

/// A place in a text.
pub(crate) struct Cursor<'a> {
    text: &'a str,
    lexer: Lexer<'a>,
    /// The token to be read next.
    pub next: Spanned<'a>,
    /// The token before it.
    pub last: Spanned<'a>,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        let mut lexer = Lexer::new(text);
        let next = lexer.next();
        let last = Spanned { token: Token::End, start: 0, end: 0, line: 1, starts_line: true };
        Cursor { text, lexer, next, last }
    }

    pub(crate) fn advance(&mut self) {
        self.last = self.next;
        self.next = self.lexer.next();
    }

    /// Reads a mark if it is next.
    pub(crate) fn take(&mut self, mark: char) -> bool {
        let found = self.next.token == Token::Mark(mark);
        if found {
            self.advance();
        }
        found
    }

    pub(crate) fn mark(&mut self, mark: char) -> Fallible<()> {
        if self.take(mark) { Ok(()) } else { Err(self.expected(&format!("`{mark}`"))) }
    }

    pub(crate) fn keyword(&mut self, keyword: &str) -> Fallible<()> {
        if self.next.token != Token::Word(keyword) {
            return Err(self.expected(&format!("`{keyword}`")));
        }
        self.advance();
        Ok(())
    }

    pub(crate) fn word(&mut self, what: &str) -> Fallible<&'a str> {
        let Token::Word(word) = self.next.token else { return Err(self.expected(what)) };
        self.advance();
        Ok(word)
    }

    /// The name of a value, without the `%`.
    pub(crate) fn value_name(&mut self, what: &str) -> Fallible<&'a str> {
        match self.next.token {
            Token::Value("") => Err(self.error_at(self.next, "expected a name after `%`")),
            Token::Value(name) => {
                self.advance();
                Ok(name)
            }
            _ => Err(self.expected(what)),
        }
    }

    /// The name of a weight or of the graph, without the `@`.
    pub(crate) fn weight_name(&mut self, what: &str) -> Fallible<&'a str> {
        match self.next.token {
            Token::Weight("") => Err(self.error_at(self.next, "expected a name after `@`")),
            Token::Weight(name) => {
                self.advance();
                Ok(name)
            }
            _ => Err(self.expected(what)),
        }
    }

    /// `{name = value, ...}`, or nothing.
    pub(crate) fn attributes(&mut self) -> Fallible<Vec<(String, Attribute)>> {
        let mut list: Vec<(String, Attribute)> = vec![];
        if !self.take('{') {
            return Ok(list);
        }
        while self.next.token != Token::Mark('}') {
            let name = self.word("an attribute")?;
            if list.iter().any(|(n, _)| n == name) {
                return Err(self.error_at(self.last, format!("attribute `{name}` is given twice")));
            }
            if list.len() == MOST_ATTRIBUTES {
                return Err(self.error_at(self.last, "too many attributes"));
            }
            self.mark('=')?;
            let value = self.attribute()?;
            list.push((name.to_owned(), value));
            if !self.take(',') {
                break;
            }
        }
        self.mark('}')?;
        Ok(list)
    }

    fn attribute(&mut self) -> Fallible<Attribute> {
        if self.take('[') {
            let mut list = vec![];
            while self.next.token != Token::Mark(']') {
                let word = self.word("a whole number")?;
                list.push(self.whole_number(self.last, word)?);
                if !self.take(',') {
                    break;
                }
            }
            self.mark(']')?;
            return Ok(Attribute::Ints(list));
        }
        let word = self.word("a number or a list of whole numbers")?;
        if word.bytes().all(|b| b.is_ascii_digit()) {
            self.whole_number(self.last, word).map(Attribute::Int)
        } else {
            self.decimal(self.last, word).map(Attribute::Float)
        }
    }

    pub(crate) fn ty(&mut self) -> Fallible<Type> {
        let word = self.word("a type, such as `bf16[T,64]`")?;
        let dtype: DType = word.parse().map_err(|message: String| self.error_at(self.last, message))?;
        self.mark('[')?;
        let mut shape = vec![];
        if !self.take(']') {
            shape.push(self.dim()?);
            while self.take(',') {
                shape.push(self.dim()?);
            }
            self.mark(']')?;
        }
        Ok(Type { dtype, shape })
    }

    fn dim(&mut self) -> Fallible<Dim> {
        let expected = "a dimension: a whole number, `T`, `S`, `R`, or such as `4*T`";
        let word = self.word(expected)?;
        if let Some(sym) = symbol(word) {
            return Ok(Dim::from(sym));
        }
        let place = self.last;
        let factor = self.whole_number(place, word)?;
        if !self.take('*') {
            return Ok(Dim::fixed(factor));
        }
        let word = self.word("`T`, `S` or `R`")?;
        match symbol(word) {
            Some(sym) => Ok(Dim { factor, sym: Some(sym) }),
            None => Err(self.error_at(place, format!("expected `T`, `S` or `R` after `*`, found `{word}`"))),
        }
    }

    pub(crate) fn whole_number(&self, place: Spanned<'a>, word: &str) -> Fallible<u64> {
        if word.is_empty() || !word.bytes().all(|b| b.is_ascii_digit()) {
            return Err(self.error_at(place, format!("expected a whole number, found `{word}`")));
        }
        word.parse().map_err(|_| self.error_at(place, format!("`{word}` does not fit 64 bits")))
    }

    pub(crate) fn decimal(&self, place: Spanned<'a>, word: &str) -> Fallible<f64> {
        match word.parse::<f64>() {
            Ok(x) if x.is_finite() && is_number(word) => Ok(x),
            Ok(_) => Err(self.error_at(place, format!("expected a finite number, found `{word}`"))),
            Err(_) => Err(self.error_at(place, format!("expected a number, found `{word}`"))),
        }
    }

    /// An error at the next token, which is not what is expected.
    pub(crate) fn expected(&self, what: &str) -> ParseError {
        if self.next.token == Token::End {
            let end = Spanned { start: self.last.end, token: Token::End, ..self.last };
            return self.error_at(end, format!("expected {what}, found the end of the text"));
        }
        let found = shortened(&self.text[self.next.start..self.next.end]);
        self.error_at(self.next, format!("expected {what}, found `{found}`"))
    }

    pub(crate) fn error_at(&self, place: Spanned<'a>, message: impl Into<String>) -> ParseError {
        let before = &self.text[..place.start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[place.start..].find('\n').map_or(self.text.len(), |at| place.start + at);
        let indent = self.text[line_start..place.start].chars().count();
        let width = self.text[place.start..place.end.min(line_end)].chars().count().max(1);
        let cut = (indent + EXCERPT_CHARS / 4).saturating_sub(EXCERPT_CHARS);
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        ParseError {
            line: place.line,
            column: indent + 1,
            message: message.into(),
            excerpt: self.text[line_start..line_end].chars().skip(cut).take(EXCERPT_CHARS).map(plain).collect(),
            indent: indent - cut,
            width: width.min(EXCERPT_CHARS - (indent - cut)),
        }
    }
}

/// True for a word that begins like a number.
pub(crate) fn is_number(word: &str) -> bool {
    word.strip_prefix('-').unwrap_or(word).starts_with(|c: char| c.is_ascii_digit())
}

fn symbol(word: &str) -> Option<Sym> {
    [Sym::T, Sym::S, Sym::R].into_iter().find(|sym| sym.to_string() == word)
}

/// At most some characters of a text that an error quotes.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(EXCERPT_CHARS / 4) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
