"""Pictures over HTTP: a server that speaks OpenAI's images API, with a queue, previews and a page.

    app, server       the application, and the process around it: `tiue-runtime serve`
    endpoints         what each address does
    image_request, bodies, nearest_size    a request's body, read and checked
    answers, kept_pictures    JSON, events, and pictures that an answer names by a URL
    guard, api_errors    who may ask; errors as clients of OpenAI know them
    serve_metrics, server_settings    figures for Prometheus; limits and permissions
    jobs, worker      a queue with one worker per pipeline; works without the server's packages

The extra [server] brings the packages. Only `jobs`, `worker` and `server_settings` are importable without it.
"""
