package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"
)

// Request is what the program asks for. Of a change to it, only that to the URL's query is passed on.
type Request struct {
	*http.Request
	// Body is the whole body.
	Body []byte
}

// Answer is what the program is to get.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
	// Delay is how long the answer is held back.
	Delay time.Duration

	fault *Toxic
}

// JSON makes an answer of a value.
func JSON(status int, value any) *Answer {
	body, err := json.Marshal(value)
	if err != nil {
		panic(err) // the test is wrong
	}
	return &Answer{Status: status, Header: http.Header{"Content-Type": {"application/json"}}, Body: body}
}

// Page makes an answer of HTML, as a web server gives it that stands before a homeserver.
func Page(status int) *Answer {
	text := http.StatusText(status)
	page := fmt.Sprintf("<!DOCTYPE html><html><head><title>%s</title></head><body><h1>%d %s</h1></body></html>", text, status, text)
	return &Answer{Status: status, Header: http.Header{"Content-Type": {"text/html"}}, Body: []byte(page)}
}

// Error makes one of Matrix's errors.
func Error(status int, code, message string) *Answer {
	return JSON(status, map[string]any{"errcode": code, "error": message})
}

// Clone makes a copy to be kept.
func (a *Answer) Clone() *Answer {
	clone := *a
	clone.Header, clone.Body = a.Header.Clone(), slices.Clone(a.Body)
	return &clone
}

// Break puts a toxic on the network before the answer goes out, and takes it away when the answer's connection is closed, which the toxic
// has to bring about: [CutAt] fewer bytes than the body has, or [Silence] with a limit. Other answers that are under way then are hit too.
func (a *Answer) Break(toxic Toxic) { a.fault = &toxic }

// Edit makes a hook of a change to an answer that is a JSON object. It says whether there was anything to be changed. Numbers are
// [json.Number].
func Edit(change func(answer map[string]any) bool) func(*Request, *Answer) bool {
	return func(_ *Request, answer *Answer) bool {
		var object map[string]any
		decoder := json.NewDecoder(bytes.NewReader(answer.Body))
		decoder.UseNumber()
		if answer.Status != http.StatusOK || decoder.Decode(&object) != nil || object == nil || !change(object) {
			return false
		}
		changed, err := json.Marshal(object)
		if err != nil {
			panic(err) // the test is wrong
		}
		answer.Body = changed
		return true
	}
}

// Hook is a function that requests or answers pass through.
type Hook struct {
	proxy *Proxy
	match func(*http.Request) bool
	// request or answer is set.
	request func(*Request) *Answer
	answer  func(*Request, *Answer) bool
	times   int

	mu      sync.Mutex
	removed bool
	used    int
	// more is closed, and replaced, each time the hook is used.
	more chan struct{}
}

// OnRequest has the hook see the requests of the pattern before the homeserver does. What it returns is the answer; nil passes the request
// on, and does not count. After so many times it is passed over; 0: never.
func (p *Proxy) OnRequest(pattern string, times int, hook func(*Request) *Answer) *Hook {
	return p.add(&Hook{match: matching(pattern), request: hook, times: times})
}

// OnAnswer has the hook see the homeserver's answers to the requests of the pattern, and change them as it likes: from now on, also those to
// requests that were made before. It says whether it did; otherwise it does not count. After so many times it is passed over; 0: never.
func (p *Proxy) OnAnswer(pattern string, times int, hook func(*Request, *Answer) bool) *Hook {
	return p.add(&Hook{match: matching(pattern), answer: hook, times: times})
}

// Repeat gives an answer of the pattern again to the next request, so many times. The function chooses the answer; nil is any.
func (p *Proxy) Repeat(pattern string, times int, chosen func(*Answer) bool) *Hook {
	kept := make(chan *Answer, 1)
	repeats := p.OnRequest(pattern, times, func(*Request) *Answer {
		select {
		case answer := <-kept:
			return answer
		default:
			return nil
		}
	})
	p.OnAnswer(pattern, times, func(_ *Request, answer *Answer) bool {
		if answer.Status != http.StatusOK || chosen != nil && !chosen(answer) {
			return false
		}
		select {
		case kept <- answer.Clone():
			return true
		default:
			return false
		}
	})
	return repeats
}

func (p *Proxy) add(hook *Hook) *Hook {
	hook.proxy, hook.more = p, make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks = append(p.hooks, hook)
	return hook
}

// hooksFor gives the hooks that a request passes through.
func (p *Proxy) hooksFor(r *http.Request) (matching []*Hook) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, hook := range p.hooks {
		if hook.match(r) {
			matching = append(matching, hook)
		}
	}
	return matching
}

// Remove takes the hook away: when it returns, nothing passes through it any more.
func (h *Hook) Remove() {
	h.mu.Lock()
	h.removed = true
	h.mu.Unlock()
	h.proxy.mu.Lock()
	defer h.proxy.mu.Unlock()
	h.proxy.hooks = slices.DeleteFunc(h.proxy.hooks, func(other *Hook) bool { return other == h })
}

// Used says how often the hook has done something.
func (h *Hook) Used() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.used
}

// Wait waits until the hook has done something so many times.
func (h *Hook) Wait(ctx context.Context, times int) error {
	for {
		h.mu.Lock()
		used, more := h.used, h.more
		h.mu.Unlock()
		if used >= times {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return fmt.Errorf("the hook was used %d times, not %d: %w", used, times, context.Cause(ctx))
		}
	}
}

// use calls the hook, unless it was removed or used often enough, and counts if it did something.
func (h *Hook) use(did func() bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.removed || h.times > 0 && h.used >= h.times || !did() {
		return
	}
	h.used++
	close(h.more)
	h.more = make(chan struct{})
}

const clientAPI = "/_matrix/client/"

// matching makes a function of a pattern.
func matching(pattern string) func(*http.Request) bool {
	method, pathPattern, found := strings.Cut(pattern, " ")
	if _, err := path.Match(pathPattern, ""); !found || err != nil {
		panic(fmt.Sprintf("%q is no pattern of requests", pattern)) // the test is wrong
	}
	return func(r *http.Request) bool {
		if method != "*" && method != r.Method {
			return false
		}
		below, _ := strings.CutPrefix(r.URL.Path, clientAPI)
		matches, _ := path.Match(pathPattern, below)
		return matches || pathPattern == "**"
	}
}
