package proxy

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// Proxy is one proxy, for one program.
type Proxy struct {
	// URL is where the program finds the homeserver.
	URL string

	network *toxiproxy.Proxy
	server  *httptest.Server
	forward *httputil.ReverseProxy
	context context.Context
	cancel  context.CancelFunc
	toxics  atomic.Int64

	mu    sync.Mutex
	hooks []*Hook
	seen  []Sight
}

// Sight is a request that came.
type Sight struct {
	Method, Path string
	At           time.Time
}

// Start makes a proxy before a homeserver. It passes everything on as it is until it is told otherwise.
func Start(homeserver string) (*Proxy, error) {
	target, err := url.Parse(homeserver)
	if err != nil {
		return nil, fmt.Errorf("failed to parse the homeserver's address: %w", err)
	}
	p := new(Proxy)
	p.context, p.cancel = context.WithCancel(zerolog.Nop().WithContext(context.Background()))
	p.forward = &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport:      &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100},
		ModifyResponse: p.changeResponse,
		// It tells of each request that the program gives up.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	p.server = httptest.NewServer(p)
	toxics := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p.network = toxiproxy.NewProxy(toxics, "homeserver", "127.0.0.1:0", p.server.Listener.Addr().String())
	if err = p.network.Start(); err != nil {
		p.cancel()
		p.server.Close()
		return nil, fmt.Errorf("failed to start the proxy: %w", err)
	}
	p.URL = "http://" + p.network.Listen
	return p, nil
}

// Close breaks all connections off, and ends the proxy.
func (p *Proxy) Close() {
	p.cancel()
	p.network.Stop()
	p.server.CloseClientConnections()
	p.server.Close()
}

// Seen gives the requests of the pattern that came so far, in their order.
func (p *Proxy) Seen(pattern string) (seen []Sight) {
	matches := matching(pattern)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, sight := range p.seen {
		if matches(&http.Request{Method: sight.Method, URL: &url.URL{Path: sight.Path}}) {
			seen = append(seen, sight)
		}
	}
	return seen
}

// MostWithin gives the most requests of the pattern that came within so long, since some time.
func (p *Proxy) MostWithin(window time.Duration, since time.Time, pattern string) (most int) {
	seen := p.Seen(pattern)
	first := 0
	for i, sight := range seen {
		for seen[first].At.Before(since) && first < i || sight.At.Sub(seen[first].At) > window {
			first++
		}
		if !sight.At.Before(since) {
			most = max(most, i-first+1)
		}
	}
	return most
}

// passage is what is known of a request while it passes.
type passage struct {
	request *Request
	fault   *Toxic
}

type passageKey struct{}

// ServeHTTP implements [http.Handler].
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	p.mu.Lock()
	p.seen = append(p.seen, Sight{r.Method, r.URL.Path, time.Now()})
	p.mu.Unlock()
	passing := &passage{request: &Request{Request: r, Body: body}}
	if answer := p.answered(passing.request); answer != nil {
		p.give(w, passing, answer)
	} else {
		passedOn := r.WithContext(context.WithValue(r.Context(), passageKey{}, passing))
		passedOn.Body, passedOn.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		p.forward.ServeHTTP(w, passedOn)
	}
	if passing.fault != nil {
		p.awaitBreak(w, r)
	}
}

// answered gives the answer of the first hook that has one.
func (p *Proxy) answered(request *Request) (answer *Answer) {
	for _, hook := range p.hooksFor(request.Request) {
		if hook.request == nil || answer != nil {
			continue
		}
		hook.use(func() bool {
			answer = hook.request(request)
			return answer != nil
		})
	}
	return answer
}

// give answers in the homeserver's stead.
func (p *Proxy) give(w http.ResponseWriter, passing *passage, answer *Answer) {
	if err := p.hold(passing, answer); err != nil {
		panic(http.ErrAbortHandler)
	}
	maps.Copy(w.Header(), answer.Header)
	w.Header().Set("Content-Length", strconv.Itoa(len(answer.Body)))
	w.WriteHeader(answer.Status)
	_, _ = w.Write(answer.Body)
}

// changeResponse has the homeserver's answer pass through the hooks.
func (p *Proxy) changeResponse(resp *http.Response) error {
	passing := resp.Request.Context().Value(passageKey{}).(*passage)
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		return err
	}
	answer := &Answer{Status: resp.StatusCode, Header: resp.Header, Body: body}
	for _, hook := range p.hooksFor(passing.request.Request) {
		if hook.answer != nil {
			hook.use(func() bool { return hook.answer(passing.request, answer) })
		}
	}
	if err = p.hold(passing, answer); err != nil {
		return err
	}
	resp.StatusCode, resp.Header = answer.Status, answer.Header
	resp.Header.Set("Content-Length", strconv.Itoa(len(answer.Body)))
	resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(answer.Body)), int64(len(answer.Body))
	return nil
}

// hold waits as long as the answer is to be held back, and then sees to the fault that it is to have.
func (p *Proxy) hold(passing *passage, answer *Answer) error {
	if answer.Delay > 0 {
		select {
		case <-time.After(answer.Delay):
		case <-passing.request.Context().Done():
			return passing.request.Context().Err()
		case <-p.context.Done():
			return p.context.Err()
		}
	}
	if answer.fault == nil {
		return nil
	}
	cure, err := p.Poison(*answer.fault)
	if err != nil {
		panic(err) // the test is wrong
	}
	passing.fault = answer.fault
	context.AfterFunc(passing.request.Context(), cure)
	return nil
}

// awaitBreak sends off what was written, and waits until its connection is closed.
func (p *Proxy) awaitBreak(w http.ResponseWriter, r *http.Request) {
	_ = http.NewResponseController(w).Flush()
	select {
	case <-r.Context().Done():
	case <-p.context.Done():
	}
	panic(http.ErrAbortHandler)
}
