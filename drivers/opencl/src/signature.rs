//! A kernel's parameters, exchanged in the program's text.
//!
//! uhmm calls most kernels from one of its own ([`program`](crate::program)). A kernel with `__local` variables cannot be called so: what they are then is left to the implementation
//! (OpenCL C 1.2, section 6.7.1), and PoCL makes one variable of all work groups'. So such a kernel itself gets the parameters that uhmm gives, and its own become variables at its beginning.
//!
//! No example: a part of the device; outside, only [`crate::open`] is used.

/// Where in a text a kernel's definition has its parameters and its body.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Signature<'t> {
    /// All up to the parenthesis that opens the parameters, with it.
    before: &'t str,
    /// The parameters, one by one.
    pub(crate) params: Vec<&'t str>,
    /// From the closing parenthesis to the brace that opens the body, with both.
    between: &'t str,
    /// All behind it.
    body: &'t str,
}

impl<'t> Signature<'t> {
    /// The definition of the kernel `name`, if the text has it without macros around the name or the parentheses.
    pub(crate) fn find(text: &'t str, name: &str) -> Option<Self> {
        let tokens = tokens(text);
        // From the last word that makes a kernel, up to its name and what opens the parameters.
        let named = (2..tokens.len()).find(|&at| {
            let head = tokens[..at - 1].rsplit(|token| matches!(token.text, ";" | "{" | "}")).next().unwrap_or_default();
            tokens[at].text == "(" && tokens[at - 1].text == name && head.iter().any(|token| matches!(token.text, "__kernel" | "kernel"))
        })?;
        let close = closing(&tokens, named)?;
        // Attributes may follow; a declaration alone is none of ours.
        let open = close + 1 + tokens[close + 1..].iter().position(|token| matches!(token.text, "{" | ";"))?;
        if tokens[open].text == ";" {
            return None;
        }
        let (start, end) = (tokens[named].at + 1, tokens[close].at);
        let mut depth = 0;
        let mut cuts = vec![start];
        for token in &tokens[named + 1..close] {
            match token.text {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                "," if depth == 0 => cuts.extend([token.at, token.at + 1]),
                _ => {}
            }
        }
        cuts.push(end);
        let params = cuts.chunks(2).map(|cut| text[cut[0]..cut[1]].trim()).collect();
        let body = tokens[open].at + 1;
        Some(Signature { before: &text[..start], params, between: &text[end..body], body: &text[body..] })
    }

    /// The text with other parameters, and what is to stand at the beginning of the body.
    pub(crate) fn with(&self, params: &str, prologue: &str) -> String {
        format!("{}{params}{} {prologue} {}", self.before, self.between, self.body)
    }
}

/// A word, or a single other character, and where it begins.
struct Token<'t> {
    text: &'t str,
    at: usize,
}

/// The text without white space, comments, literals and lines of the preprocessor.
fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let mut tokens = vec![];
    let mut at = 0;
    let mut line_begins = true;
    let past = |at: usize, end: &str| text[at..].find(end).map_or(text.len(), |found| at + found + end.len());
    while at < text.len() {
        let byte = bytes[at];
        let begins = line_begins;
        line_begins = byte == b'\n' || (begins && byte.is_ascii_whitespace());
        at = match byte {
            b'/' if bytes.get(at + 1) == Some(&b'/') => at + text[at..].find('\n').unwrap_or(text.len() - at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => past(at + 2, "*/"),
            b'#' if begins => {
                // A line that ends with a backslash goes on.
                let mut end = past(at, "\n");
                while text[..end].ends_with("\\\n") || text[..end].ends_with("\\\r\n") {
                    end = past(end, "\n");
                }
                line_begins = true;
                end
            }
            b'"' | b'\'' => {
                let mut end = at + 1;
                while end < bytes.len() && bytes[end] != byte {
                    end += if bytes[end] == b'\\' { 2 } else { 1 };
                }
                (end + 1).min(bytes.len())
            }
            _ if byte.is_ascii_whitespace() => at + 1,
            _ => {
                let word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
                let len = bytes[at..].iter().take_while(|&byte| word(byte)).count();
                // What is no ASCII is in no name: a whole character of it.
                let len = if len > 0 { len } else { text[at..].chars().next().map_or(1, char::len_utf8) };
                tokens.push(Token { text: &text[at..at + len], at });
                at + len
            }
        };
    }
    tokens
}

/// The token that closes the parenthesis that the token `open` opens.
fn closing(tokens: &[Token<'_>], open: usize) -> Option<usize> {
    let mut depth = 0;
    tokens[open..]
        .iter()
        .position(|token| {
            depth += i32::from(token.text == "(") - i32::from(token.text == ")");
            depth == 0
        })
        .map(|at| open + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_found_among_what_looks_like_it() {
        let text = "// __kernel void f(int no) {\n#define G \\\n kernel void f(int no) {\nvoid f_(int f) { f(1); } /* kernel void f( { */\n\
                    __kernel __attribute__((reqd_work_group_size(64, 1, 1))) void\nf ( __global float *restrict r,\n const uint n /* , */ )\n{ f(r); }";
        let found = Signature::find(text, "f").unwrap();
        assert_eq!(found.params, ["__global float *restrict r", "const uint n /* , */"]);
        assert_eq!(
            found.with("ulong a", "x;"),
            text.replace(" __global float *restrict r,\n const uint n /* , */ ", "ulong a").replace("{ f(r)", "{ x;  f(r)")
        );
    }

    #[test]
    fn what_is_no_definition_is_not_found() {
        for text in [
            "",
            "__kernel void f(int n);",
            "void f(int n) {}",
            "__kernel void g(int n) { f(n); }",
            "__kernel void f(int n",
            "__kernel void f(int n) é \"{",
        ] {
            assert_eq!(Signature::find(text, "f"), None, "{text}");
        }
        assert_eq!(Signature::find("__kernel void g(int n) { f(n); } __kernel void f(char c) {}", "f").unwrap().params, ["char c"]);
        assert_eq!(Signature::find("__kernel void g() {} kernel void f() {}", "f").unwrap().params, [""]);
    }
}
