//! Tokens of the text form, made one at a time: a name behind `%` or `@`, a word (identifier, number or scope), or a mark.

/// What stands at a place of the text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Token<'a> {
    /// A value's name, without the `%`.
    Value(&'a str),
    /// A weight's or a graph's name, without the `@`.
    Weight(&'a str),
    /// A run of name characters: keyword, operator, number, scope or stages.
    Word(&'a str),
    /// Any other character.
    Mark(char),
    /// The end of the text.
    End,
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spanned<'a> {
    /// The token.
    pub token: Token<'a>,
    /// First byte.
    pub start: usize,
    /// Past the last byte.
    pub end: usize,
    /// Line, from 1.
    pub line: usize,
    /// True if it is the first of its line.
    pub starts_line: bool,
}

/// Reads tokens from left to right.
pub(crate) struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: usize,
}

/// True for a character of names, words and scopes.
fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '+' | '/')
}

/// True for text that can stand as a name: not empty, of letters, digits and `_.-+/`.
pub(crate) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_name_char)
}

impl<'a> Lexer<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Lexer { text, at: 0, line: 1 }
    }

    pub(crate) fn next(&mut self) -> Spanned<'a> {
        let starts_line = self.skip_blank() || self.at == 0;
        let start = self.at;
        let token = match self.text[start..].chars().next() {
            None => Token::End,
            Some('%') => {
                self.at += 1;
                Token::Value(self.name())
            }
            Some('@') => {
                self.at += 1;
                Token::Weight(self.name())
            }
            Some(c) if is_name_char(c) => Token::Word(self.name()),
            Some(c) => {
                self.at += c.len_utf8();
                Token::Mark(c)
            }
        };
        Spanned { token, start, end: self.at, line: self.line, starts_line }
    }

    fn name(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let length = rest.find(|c| !is_name_char(c)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    /// Skips white space and comments; true if a line ended on the way.
    fn skip_blank(&mut self) -> bool {
        let line = self.line;
        while let Some(c) = self.text[self.at..].chars().next() {
            match c {
                ';' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.find('\n').unwrap_or(rest.len());
                    continue;
                }
                '\n' => self.line += 1,
                _ if c.is_whitespace() => {}
                _ => break,
            }
            self.at += c.len_utf8();
        }
        self.line != line
    }
}
