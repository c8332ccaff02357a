package element

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/child"
)

const (
	// defaultTimeout is how long a call waits whose context has no deadline.
	defaultTimeout = time.Minute
	// timeoutMargin is how much earlier than the context a wait in the driver ends, so that we get to know what was missing.
	timeoutMargin = 500 * time.Millisecond
	closePatience = 5 * time.Second
	// answerLimit is how long a line of the driver may be, in bytes.
	answerLimit = 64 << 20
)

// ErrClosed says that the client's process has ended, by [Client.Close] or otherwise.
var ErrClosed = errors.New("the process of Element's crypto has ended")

// Client is one device of one user with Element's crypto. It may be used by several goroutines at once.
type Client struct {
	user, password string
	session        session
	process        *child.Process
	// readerDone is closed when nothing more can come from the driver.
	readerDone chan struct{}

	lock   sync.Mutex
	lastID int
	// waiting are the calls that have no answer yet, by their ID.
	waiting map[int]chan<- response
	closed  bool
}

// session is the result of a login.
type session struct {
	UserID      id.UserID   `json:"user_id"`
	DeviceID    id.DeviceID `json:"device_id"`
	AccessToken string      `json:"access_token"`
}

type params = map[string]any

type request struct {
	ID     int    `json:"id"`
	Method string `json:"method"`
	Params params `json:"params"`
}

type response struct {
	ID     int             `json:"id"`
	Result json.RawMessage `json:"result"`
	Error  *string         `json:"error"`
}

// Start installs Element's crypto where it is not installed yet, logs in a new device of the account, and returns when it has
// synced and its keys are published. User is a localpart or a whole user ID. The client runs until [Client.Close], or until
// this process ends; the context is for the start alone.
func Start(ctx context.Context, projectRoot, homeserver, user, password string) (*Client, error) {
	dir, err := child.Install(ctx, projectRoot, "element")
	if err != nil {
		return nil, err
	}
	client := &Client{
		user: user, password: password,
		readerDone: make(chan struct{}), waiting: make(map[int]chan<- response),
	}
	if err = client.run(dir); err != nil {
		return nil, err
	}
	login := params{"homeserver": homeserver, "user": user, "password": password}
	if err = client.call(ctx, "login", login, &client.session); err != nil {
		return nil, errors.Join(err, client.Close())
	}
	return client, nil
}

// run starts the driver, and the goroutine that takes its answers, which ends with it.
func (c *Client) run(dir string) error {
	answers, output, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("failed to make a pipe: %w", err)
	}
	defer output.Close()
	// The driver is a link to its source, from beside the modules that it needs.
	cmd := exec.Command("node", "--preserve-symlinks-main", "driver.mjs")
	cmd.Dir = dir
	cmd.Stdout = output
	var log io.Writer
	if os.Getenv("ELEMENT_LOG_LEVEL") != "" {
		log = os.Stderr
	}
	if c.process, err = child.Start(cmd, log); err != nil {
		answers.Close()
		return err
	}
	go c.read(answers)
	return nil
}

// read hands each answer to the call that waits for it.
func (c *Client) read(answers io.ReadCloser) {
	defer close(c.readerDone)
	defer answers.Close()
	lines := bufio.NewScanner(answers)
	lines.Buffer(nil, answerLimit)
	for lines.Scan() {
		var answer response
		if err := json.Unmarshal(lines.Bytes(), &answer); err != nil {
			continue
		}
		c.lock.Lock()
		waiting := c.waiting[answer.ID]
		delete(c.waiting, answer.ID)
		c.lock.Unlock()
		if waiting != nil {
			waiting <- answer
		}
	}
}

// call asks the driver for something, and reads the result into a value when there is one to take it.
func (c *Client) call(ctx context.Context, method string, parameters params, result any) error {
	parameters["timeout_ms"] = timeout(ctx)
	answer := make(chan response, 1)
	callID, err := c.submit(method, parameters, answer)
	if err != nil {
		return err
	}
	select {
	case got := <-answer:
		return c.take(method, got, result)
	case <-c.readerDone:
	case <-ctx.Done():
		c.lock.Lock()
		delete(c.waiting, callID)
		c.lock.Unlock()
		return c.failure(method, context.Cause(ctx))
	}
	select {
	case got := <-answer:
		return c.take(method, got, result)
	default:
		return fmt.Errorf("%w during %s of %s\n%s", ErrClosed, method, c.user, c.process.Tail())
	}
}

// submit writes a call to the driver, and notes who waits for the answer.
func (c *Client) submit(method string, parameters params, answer chan<- response) (callID int, err error) {
	c.lock.Lock()
	defer c.lock.Unlock()
	if c.closed {
		return 0, fmt.Errorf("failed to %s: %w", method, ErrClosed)
	}
	c.lastID++
	line, err := json.Marshal(request{ID: c.lastID, Method: method, Params: parameters})
	if err != nil {
		return 0, fmt.Errorf("failed to encode the call of %s: %w", method, err)
	}
	c.waiting[c.lastID] = answer
	if _, err = c.process.Stdin.Write(append(line, '\n')); err != nil {
		delete(c.waiting, c.lastID)
		return 0, fmt.Errorf("%w: %w\n%s", ErrClosed, err, c.process.Tail())
	}
	return c.lastID, nil
}

// take gives the result of an answer, or the error that it is.
func (c *Client) take(method string, got response, result any) error {
	if got.Error != nil {
		return c.failure(method, errors.New(*got.Error))
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(got.Result, result); err != nil {
		return fmt.Errorf("failed to decode the result of %s: %w", method, err)
	}
	return nil
}

// failure makes an error of why a call failed.
func (c *Client) failure(method string, err error) error {
	return fmt.Errorf("failed to %s as %s with Element's crypto: %w", method, c.user, err)
}

// timeout says how long the driver may wait, in milliseconds.
func timeout(ctx context.Context) int64 {
	deadline, limited := ctx.Deadline()
	if !limited {
		return defaultTimeout.Milliseconds()
	}
	return max(time.Until(deadline)-timeoutMargin, time.Millisecond).Milliseconds()
}

// PID is the ID of the client's process.
func (c *Client) PID() int { return c.process.PID() }

// Close ends the client's process, and waits until it is gone. The device stays logged in. It may be called more than once.
func (c *Client) Close() error {
	c.lock.Lock()
	c.closed = true
	c.lock.Unlock()
	err := c.process.Hangup(closePatience)
	<-c.readerDone
	return err
}
