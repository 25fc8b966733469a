//! Requests and answers on a connection, one each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;

use super::{Fault, Shelf};

pub struct Request {
    pub method: String,
    /// Without the query, `%2F` and the like undone.
    pub path: String,
    pub query: String,
    /// As it came.
    pub target: String,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Status, headers and body; a HEAD request gets the length of the body alone.
pub struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    fault: Option<Fault>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        all.find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    fn read(stream: &TcpStream) -> Option<(Self, BufReader<&TcpStream>)> {
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            Some(line.trim_end().to_string())
        };
        let first = line()?;
        let mut words = first.split(' ').map(str::to_string);
        let (method, target) = (words.next()?, words.next()?);
        let mut headers = Vec::new();
        while let Some((name, value)) = line()?.split_once(':') {
            headers.push((name.to_lowercase(), value.trim().to_string()));
        }
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let request = Self {
            method,
            path: path.replace("%2F", "/"),
            query: query.to_string(),
            headers,
            body: Vec::new(),
            target,
        };
        Some((request, reader))
    }
}

impl Answer {
    pub fn new(status: u16) -> Self {
        Self {
            status,
            headers: String::new(),
            body: Vec::new(),
            fault: None,
        }
    }

    pub fn header(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.headers += &format!("{name}: {value}\r\n");
        self
    }

    pub fn with(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// `X-Error-Code`.
    pub fn because(self, code: &str) -> Self {
        self.header("X-Error-Code", code)
    }

    /// `X-Error-Message`, and the same in the body.
    pub fn saying(self, words: &str) -> Self {
        let body = serde_json::json!({ "error": words }).to_string();
        self.header("X-Error-Message", words).with(body)
    }

    pub fn spoilt(mut self, fault: Option<Fault>) -> Self {
        self.fault = fault;
        self
    }

    fn send(mut self, stream: &mut &TcpStream, with_body: bool) {
        let half = self.body.len() / 2;
        let mut length = self.body.len();
        match self.fault {
            Some(Fault::Cut) => self.body.truncate(half),
            Some(Fault::Short) => {
                self.body.truncate(half);
                length = half;
            }
            Some(Fault::Damage) => *self.body.last_mut().unwrap() ^= 1,
            Some(Fault::Refuse) | None => {}
        }
        if !with_body {
            self.body.clear();
        }
        let head = format!(
            "HTTP/1.1 {} X\r\nConnection: close\r\nContent-Length: {length}\r\n{}\r\n",
            self.status, self.headers
        );
        let _ = stream.write_all(&[head.as_bytes(), &self.body].concat());
    }
}

/// Reads a request, answers it, and leaves.
pub fn serve(mut stream: &TcpStream, shelf: &Mutex<Shelf>, url: &str) {
    let Some((mut request, mut reader)) = Request::read(stream) else {
        return;
    };
    let length: usize = request
        .header("content-length")
        .map_or(0, |length| length.parse().unwrap());
    let note = match request.method.as_str() {
        "GET" | "HEAD" => format!(
            "{} {}",
            request.target,
            request.header("range").unwrap_or("")
        ),
        method => format!("{method} {}", request.target),
    };
    let fault = {
        let mut shelf = shelf.lock().unwrap();
        shelf.requests.push(note);
        let place = request.path.strip_prefix("/storage/");
        place.and_then(|place| shelf.fault(place.split('/').next().unwrap()))
    };
    if fault == Some(Fault::Cut) {
        let mut half = vec![0; length / 2];
        let _ = reader.read_exact(&mut half);
        return; // and the connection closes
    }
    request.body = vec![0; length];
    if reader.read_exact(&mut request.body).is_err() {
        return;
    }
    let answer = match fault {
        Some(_) => Answer::new(403).with("<Error><Message>refused</Message></Error>"),
        None => super::answer(&request, &mut shelf.lock().unwrap(), url),
    };
    answer.send(&mut stream, request.method != "HEAD");
}
