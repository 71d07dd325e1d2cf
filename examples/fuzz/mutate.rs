//! Changes of bytes and of structured text.

/// Random numbers that follow from a seed and the case alone.
pub struct Random(u64);

impl Random {
    /// The numbers of a case.
    pub fn new(seed: u64, case: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ case.wrapping_mul(0xD1B5_4A32_D192_ED03))
    }

    /// The next 64 bits, by splitmix64.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if there is none.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    fn choose<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }
}

/// Bytes with some of them flipped, replaced, removed, repeated or cut off.
pub fn bytes(input: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            bytes.push(random.bits() as u8);
        }
        let at = random.below(bytes.len());
        let length = 1 + random.below(16.min(bytes.len() - at));
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.bits() as u8,
            2 => drop(bytes.drain(at..at + length)),
            3 => bytes.truncate(at),
            4 => {
                let part = bytes[at..at + length].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            _ => bytes[at..at + length].fill([0, 0xFF][random.below(2)]),
        }
    }
    bytes
}

/// Text as numbers, words, white space and single signs.
pub struct Tokens {
    all: Vec<String>,
    numbers: Vec<usize>,
    words: Vec<usize>,
}

impl Tokens {
    /// Splits a text.
    pub fn new(text: &str) -> Self {
        let (mut all, mut numbers, mut words) = (vec![], vec![], vec![]);
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let same: fn(char) -> bool = match first {
                '0'..='9' => |c| c.is_ascii_digit(),
                'a'..='z' | 'A'..='Z' | '_' => |c| c.is_ascii_alphanumeric() || c == '_',
                '\n' => |_| false,
                c if c.is_whitespace() => |c| c.is_whitespace() && c != '\n',
                _ => |_| false,
            };
            let length = rest[first.len_utf8()..].find(|c| !same(c)).map_or(rest.len(), |n| n + first.len_utf8());
            if first.is_ascii_digit() {
                numbers.push(all.len());
            } else if first.is_ascii_alphabetic() || first == '_' {
                words.push(all.len());
            }
            all.push(rest[..length].to_owned());
            rest = &rest[length..];
        }
        Tokens { all, numbers, words }
    }

    /// The text with a few changes: mostly of numbers and names, some of signs and lines.
    pub fn mutated(&self, random: &mut Random) -> String {
        let mut tokens = self.all.clone();
        for _ in 0..1 + random.below(3) {
            match random.below(20) {
                0..=9 if !self.numbers.is_empty() => {
                    let at = self.numbers[random.below(self.numbers.len())];
                    tokens[at] = self.number(at, random);
                }
                10..=15 if !self.words.is_empty() => {
                    let at = self.words[random.below(self.words.len())];
                    tokens[at].clone_from(&self.all[self.words[random.below(self.words.len())]]);
                }
                16 => tokens[random.below(self.all.len())].clear(),
                17 => {
                    let (at, from) = (random.below(self.all.len()), random.below(self.all.len()));
                    tokens[at].clone_from(&self.all[from]);
                }
                _ => self.move_line(&mut tokens, random),
            }
        }
        tokens.concat()
    }

    /// Another number for the one at a position: a near one, one of the text, or one at an edge.
    fn number(&self, at: usize, random: &mut Random) -> String {
        const EDGES: [&str; 16] = [
            "0",
            "1",
            "2",
            "255",
            "256",
            "65536",
            "2147483647",
            "2147483648",
            "4294967295",
            "4294967296",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "18446744073709551616",
            "1e400",
            "-1",
        ];
        let old: u64 = self.all[at].parse().unwrap_or(0);
        let near = [
            old.wrapping_add(1),
            old.wrapping_sub(1),
            old.wrapping_mul(2),
            old / 2,
            old.wrapping_add(256),
            old.wrapping_sub(256),
            old.wrapping_add(4),
            random.bits() % 64,
        ];
        match random.below(8) {
            0..=3 => near[random.below(near.len())].to_string(),
            4..=5 => self.all[self.numbers[random.below(self.numbers.len())]].clone(),
            6 => random.choose(&EDGES).to_owned(),
            _ => (random.bits() >> random.below(64)).to_string(),
        }
    }

    /// Removes a line, or puts another in its place.
    fn move_line(&self, tokens: &mut [String], random: &mut Random) {
        let line = |near: usize| {
            let end = (near..self.all.len()).find(|&i| self.all[i] == "\n").unwrap_or(self.all.len());
            let start = (0..near).rev().find(|&i| self.all[i] == "\n").map_or(0, |i| i + 1);
            start..end.max(start)
        };
        let (to, from) = (line(random.below(self.all.len())), line(random.below(self.all.len())));
        let replacement = if random.below(2) == 0 { String::new() } else { self.all[from].concat() };
        let start = to.start;
        tokens[to].iter_mut().for_each(String::clear);
        if let Some(token) = tokens.get_mut(start) {
            token.insert_str(0, &replacement);
        }
    }
}
