package postgres

import (
	"context"
	"sync"
)

// Pool lends databases that have tables and nothing in them. It is of use where one is needed for each of many tests: to empty
// one takes far less time than to make it, and leaves the server few files to delete in the end.
type Pool struct {
	root    string
	prepare func(ctx context.Context, uri string) error

	start sync.Once
	err   error

	server *Server
	// prepared is the database that new ones are copied from.
	prepared string

	mu   sync.Mutex
	free []string
}

// NewPool gives a pool whose server starts when it is needed first. What prepare makes of the first database, which it closes
// again, all of them have.
func NewPool(projectRoot string, prepare func(ctx context.Context, uri string) error) *Pool {
	return &Pool{root: projectRoot, prepare: prepare}
}

// Server gives the server, and starts it if it is not running yet.
func (p *Pool) Server() (*Server, error) {
	// Whoever is the first must not end it for the others.
	p.start.Do(func() { p.err = p.startNow(context.Background()) })
	return p.server, p.err
}

func (p *Pool) startNow(ctx context.Context) (err error) {
	if p.server, err = Start(ctx, p.root); err != nil {
		return err
	}
	if p.prepared, err = p.server.NewDatabase(ctx); err != nil {
		return err
	}
	return p.prepare(ctx, p.prepared)
}

// Take lends a database, until it is given back with [Pool.GiveBack].
func (p *Pool) Take(ctx context.Context) (uri string, err error) {
	server, err := p.Server()
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	if last := len(p.free) - 1; last >= 0 {
		uri, p.free = p.free[last], p.free[:last]
	}
	p.mu.Unlock()
	if uri != "" {
		return uri, nil
	}
	return server.Clone(ctx, p.prepared)
}

// GiveBack empties a database that was lent, and ends who is connected to it.
func (p *Pool) GiveBack(ctx context.Context, uri string) error {
	if err := p.server.Empty(ctx, uri); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = append(p.free, uri)
	return nil
}

// Stop ends the server, if it was started. Nothing may be taken any more.
func (p *Pool) Stop() error {
	if p.server == nil {
		return nil
	}
	return p.server.Stop()
}
